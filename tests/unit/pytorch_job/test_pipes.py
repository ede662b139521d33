"""Dagster runs over the fake cluster: what a user sees (twins of tests/cluster/test_stories.py)."""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
from dagster._core.execution.job_execution_result import JobExecutionResult
from dagster._core.pipes.reattach import PIPES_LAUNCH_HANDLE_METADATA_KEY
from dagster._core.storage.tags import RESUME_RETRY_TAG

from resources.kubernetes.diagnosis import WatchLimits
from resources.kubernetes.job_config import JobConfig
from resources.kubernetes.pipes import PipesJobClient
from resources.kubernetes.watch import JobWatcher
from resources.object_store import FolderStore
from resources.pipes_reader import PipesStoreMessageReader
from resources.pipes_store import STORE_URI_PARAM
from tests.unit.pytorch_job.fake_cluster import (
    RUNNING,
    FakeCluster,
    Kind,
    api_error,
    container_status,
    pod_body,
    runs_and_succeeds,
    terminated,
)
from tests.unit.pytorch_job.test_messages import speak

KEY = dg.AssetKey("trained")


@dataclass
class Story:
    """One cluster, one Dagster instance, and an asset that trains on it."""

    cluster: FakeCluster
    store: FolderStore
    instance: dg.DagsterInstance
    epochs: list[tuple[int, bool]] = field(default_factory=list)
    after_training: Callable[[], None] = lambda: None

    @property
    def kind(self) -> Kind:
        return self.cluster.kind

    @property
    def config(self) -> JobConfig:
        return self.kind.config(image="image:1", replicas=2)

    def client(self) -> PipesJobClient[Any]:
        return self.kind.pipes(
            message_store=self.store,
            client=self.kind.client(self.cluster, self.cluster),
            namespace="space",
            limits=WatchLimits(outage_timeout_seconds=60, unschedulable_timeout_seconds=100),
            clock=self.cluster.clock,
            sleeper=self.cluster.clock.sleep,
        )

    def train(self, context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        def on_message(payload: Any, replayed: bool) -> None:
            self.epochs.append((payload["epoch"], replayed))

        invocation = self.client().run(
            context=context, config=self.config, name_prefix="Cifar10_", on_message=on_message
        )
        self.after_training()
        last = [message["epoch"] for message in invocation.get_custom_messages()][-1:]
        return dg.MaterializeResult(metadata={"epochs": last[0] if last else 0, **invocation.metadata})

    def run(self) -> dg.ExecuteInProcessResult:
        @dg.asset(key=KEY, retry_policy=dg.RetryPolicy(max_retries=1))
        def trained(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
            return self.train(context)

        return dg.materialize([trained], instance=self.instance, raise_on_error=False)

    def cancel(self) -> None:
        """What Dagster does on terminate: the status first, then the signal."""
        (run,) = self.instance.get_runs(filters=dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED]))
        self.instance.report_run_canceling(run)
        os.kill(os.getpid(), signal.SIGTERM)

    def evict(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def say(self, *epochs: int) -> None:
        """Let the process in the pod say something, as the manifest tells it to."""
        (job,) = self.cluster.jobs.values()
        launch_id = job["metadata"]["annotations"][self.kind.job.launch_annotation()]
        speak({STORE_URI_PARAM: self.store.at(f"messages/{launch_id}/").uri()}, *epochs)

    def status(self, result: dg.ExecuteInProcessResult) -> dg.DagsterRunStatus:
        run = self.instance.get_run_by_id(result.run_id)
        assert run
        return run.status

    def failure_of(self, result: dg.ExecuteInProcessResult) -> Any:
        (event,) = [event for event in result.all_node_events if event.is_step_failure]
        return event.step_failure_data


@pytest.fixture
def story(cluster: FakeCluster, tmp_path: Path) -> Iterator[Story]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield Story(cluster, FolderStore(tmp_path), instance)


def test_success_brings_results_metadata_and_logs(story: Story, capsys: pytest.CaptureFixture[str]) -> None:
    story.cluster.on_created = runs_and_succeeds(10, log="2026-01-01T00:00:00Z loss 0.5\n")
    story.cluster.clock.after(5, lambda: story.say(1, 2))
    result = story.run()
    assert result.success
    metadata = result.asset_materializations_for_node("trained")[0].metadata
    assert metadata["epochs"].value == 2
    assert str(metadata[story.kind.key].value).startswith("space/cifar10-")
    assert metadata[f"{story.kind.key}_adopted"].value is False
    assert story.epochs == [(1, False), (2, False)]
    assert "[master-0] loss 0.5" in capsys.readouterr().out


def test_manifest_carries_run_step_and_pipes(story: Story) -> None:
    story.cluster.on_created = runs_and_succeeds()
    result = story.run()
    (job,) = story.cluster.jobs.values()
    assert job["metadata"]["labels"]["dagster/run-id"] == result.run_id
    assert job["metadata"]["labels"]["dagster/op"] == "trained"
    for labels, env in pods_of(job["spec"]):
        assert labels["dagster/run-id"] == result.run_id
        assert {"DAGSTER_PIPES_CONTEXT", "DAGSTER_PIPES_MESSAGES"} <= {variable["name"] for variable in env}


def pods_of(spec: dict[str, Any]) -> Iterator[tuple[dict[str, str], list[dict[str, Any]]]]:
    """Labels and environment of each kind of pod in the spec of a job."""
    for replica in spec.get("pytorchReplicaSpecs", {}).values():
        template = replica["template"]
        yield template["metadata"]["labels"], template["spec"]["containers"][0]["env"]
    for patch in spec.get("runtimePatches", ()):
        (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
        yield node["template"]["spec"]["template"]["metadata"]["labels"], spec["trainer"]["env"]


def test_launch_is_recorded_for_dagsters_own_reattachment(story: Story) -> None:
    story.cluster.on_created = runs_and_succeeds()
    result = story.run()
    events = story.instance.all_logs(result.run_id, of_type=dg.DagsterEventType.ENGINE_EVENT)
    handles = [
        e
        for e in events
        if e.dagster_event and PIPES_LAUNCH_HANDLE_METADATA_KEY in e.dagster_event.engine_event_data.metadata
    ]
    assert len(handles) == 1
    assert next(iter(story.cluster.jobs)) in handles[0].message


def failing(exit_code: int, reason: str = "Error") -> Callable[[FakeCluster, str], None]:
    def act(cluster: FakeCluster, name: str) -> None:
        status = container_status(terminated(exit_code, reason))
        cluster.pods[name] = [pod_body(name, phase="Failed", container_statuses=[status])]
        cluster.logs[f"{name}-master-0"] = "2026-01-01T00:00:00Z RuntimeError: broken\n"
        cluster.condition(name, "Failed", "1 replica failed")

    return act


def test_failure_says_why_and_is_retried_by_a_new_job(story: Story) -> None:
    attempts: list[str] = []

    def act(cluster: FakeCluster, name: str) -> None:
        attempts.append(name)
        (failing(3) if len(attempts) == 1 else runs_and_succeeds())(cluster, name)

    story.cluster.on_created = act
    result = story.run()
    assert result.success
    assert len(set(attempts)) == 2
    assert story.cluster.most_active == 1


def test_failure_that_a_retry_cannot_help_is_not_retried(story: Story) -> None:
    story.cluster.on_created = failing(137, "OOMKilled")
    result = story.run()
    assert story.cluster.num_created == 1
    failure = story.failure_of(result).user_failure_data
    assert "out of memory" in failure.description
    assert failure.metadata["exit_code"].value == 137
    assert "RuntimeError: broken" in failure.metadata["log of master-0"].value


def test_job_that_never_starts_is_removed(story: Story) -> None:
    def act(cluster: FakeCluster, name: str) -> None:
        condition = {"type": "PodScheduled", "status": "False", "message": "0/1 nodes are available"}
        cluster.pods[name] = [pod_body(name, phase="Pending", conditions=[condition])]

    story.cluster.on_created = act
    result = story.run()
    assert "0/1 nodes are available" in story.failure_of(result).user_failure_data.description
    assert (story.cluster.jobs, story.cluster.pods) == ({}, {})


def test_cancelled_after_the_create_call_was_sent_and_before_its_answer(story: Story) -> None:
    story.cluster.on_created = runs_and_succeeds(seconds=3600)
    story.cluster.after_create = story.cancel
    result = story.run()
    assert story.status(result) == dg.DagsterRunStatus.CANCELED
    assert (story.cluster.jobs, story.cluster.pods) == ({}, {})


def test_cancelled_before_the_create_call_took_effect(story: Story) -> None:
    story.cluster.before_create = story.cancel
    result = story.run()
    assert story.status(result) == dg.DagsterRunStatus.CANCELED
    assert story.cluster.jobs == {}


def test_cancelled_with_a_job_and_no_pods(story: Story) -> None:
    story.cluster.clock.after(5, story.cancel)
    result = story.run()
    assert story.cluster.num_created == 1
    assert story.status(result) == dg.DagsterRunStatus.CANCELED
    assert story.cluster.jobs == {}


def test_cancelled_while_a_create_call_without_an_answer_is_on_its_way(story: Story) -> None:
    """The call times out, and the object is stored only after the run was cancelled."""
    late: list[Any] = []

    def lose_request(call: str) -> None:
        if call == "create" and not late:
            late.append(call)
            story.cluster.clock.after(0.5, story.cancel)
            story.cluster.clock.after(6, store_late)
            raise TimeoutError("no answer in 10 s")

    def store_late() -> None:
        labels = {"app.kubernetes.io/managed-by": story.kind.job.managed_by(), **late_labels()}
        body = {"metadata": {"name": "late", "namespace": "space", "labels": labels}}
        story.cluster.create_namespaced_custom_object("", "", "space", "", body)

    def late_labels() -> dict[str, str]:
        from resources.kubernetes.naming import RUN_ID_LABEL, STEP_LABEL, step_digest

        (run,) = story.instance.get_runs(limit=1)
        return {RUN_ID_LABEL: run.run_id, STEP_LABEL: step_digest("trained")}

    story.cluster.failing = lose_request
    result = story.run()
    assert story.status(result) == dg.DagsterRunStatus.CANCELED
    assert story.cluster.num_created == 1
    assert story.cluster.jobs == {}


@pytest.mark.parametrize("seconds", [0.5, 20])
def test_cancelled_while_pods_start_or_run(story: Story, seconds: float) -> None:
    story.cluster.on_created = runs_and_succeeds(seconds=3600)
    story.cluster.clock.after(seconds, story.cancel)
    begin = story.cluster.clock()
    result = story.run()
    assert story.status(result) == dg.DagsterRunStatus.CANCELED
    assert (story.cluster.jobs, story.cluster.pods) == ({}, {})
    assert story.cluster.clock() - begin - seconds < 15


def test_cancelled_without_a_retry_policy_ends_as_dagster_ends_it(story: Story) -> None:
    story.cluster.on_created = runs_and_succeeds(seconds=3600)
    story.cluster.clock.after(20, story.cancel)
    with execute(story) as result:
        run = story.instance.get_run_by_id(result.run_id)
        assert run
        assert run.status == dg.DagsterRunStatus.CANCELED
    assert (story.cluster.jobs, story.cluster.pods) == ({}, {})


def test_second_signal_does_not_stop_the_clean_up(story: Story) -> None:
    story.cluster.on_created = runs_and_succeeds(seconds=3600)
    story.cluster.clock.after(20, story.cancel)
    story.cluster.clock.after(21, story.evict)
    result = story.run()
    assert story.status(result) == dg.DagsterRunStatus.CANCELED
    assert (story.cluster.jobs, story.cluster.pods) == ({}, {})


def test_evicted_run_worker_leaves_the_job(story: Story) -> None:
    story.cluster.on_created = runs_and_succeeds(seconds=3600)
    story.cluster.clock.after(20, story.evict)
    with execute(story) as result:
        assert not result.success
    assert len(story.cluster.jobs) == 1


def test_interrupt_that_dagster_answers_with_a_step_retry_adopts_the_job(story: Story) -> None:
    story.cluster.on_created = runs_and_succeeds(seconds=100)
    story.cluster.clock.after(20, story.evict)
    assert story.run().success
    assert story.cluster.num_created == 1


def test_step_retry_after_an_outage_adopts_the_job_and_records_metrics_once(story: Story) -> None:
    story.cluster.on_created = runs_and_succeeds(seconds=200)
    clock = story.cluster.clock

    def fail(call: str) -> None:
        raise api_error(503, "away")

    clock.after(5, lambda: story.say(1))
    clock.after(20, lambda: setattr(story.cluster, "failing", fail))
    clock.after(95, lambda: setattr(story.cluster, "failing", lambda call: None))
    clock.after(150, lambda: story.say(2))
    result = story.run()
    assert result.success
    assert story.cluster.num_created == 1
    assert story.epochs == [(1, False), (1, True), (2, False)]
    metadata = result.asset_materializations_for_node("trained")[0].metadata
    assert (metadata["epochs"].value, metadata[f"{story.kind.key}_adopted"].value) == (2, True)


def test_job_that_succeeded_is_not_run_again_when_the_step_fails_later(story: Story) -> None:
    story.cluster.on_created = runs_and_succeeds()
    story.cluster.clock.after(5, lambda: story.say(1))
    failures = [RuntimeError("the store was away")]

    def fail_once() -> None:
        if failures:
            raise failures.pop()

    story.after_training = fail_once
    result = story.run()
    assert result.success
    assert story.cluster.num_created == 1
    assert story.epochs == [(1, False), (1, True)]


CURRENT: list[Story] = []


@dg.asset(key=KEY)
def trained_in_a_job(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    return CURRENT[-1].train(context)


def training_job() -> dg.JobDefinition:
    return dg.Definitions(
        assets=[trained_in_a_job],
        jobs=[dg.define_asset_job("training", executor_def=dg.in_process_executor)],
    ).resolve_job_def("training")


def execute(story: Story, parent: JobExecutionResult | None = None, *, from_failure: bool = True) -> JobExecutionResult:
    options = None
    if parent and from_failure:
        options = dg.ReexecutionOptions.from_failure(parent.run_id, story.instance)
    elif parent:
        options = dg.ReexecutionOptions(parent_run_id=parent.run_id)
    CURRENT.append(story)
    tags = {RESUME_RETRY_TAG: "true"} if parent and from_failure else {}  # as Dagster's page and its run retries do
    return dg.execute_job(
        dg.reconstructable(training_job),
        instance=story.instance,
        raise_on_error=False,
        reexecution_options=options,
        tags=tags,
    )


def test_retried_run_adopts_the_job_that_an_evicted_worker_left(story: Story) -> None:
    story.cluster.on_created = runs_and_succeeds(seconds=100)
    clock = story.cluster.clock
    clock.after(5, lambda: story.say(1))
    clock.after(20, story.evict)
    with execute(story) as first:
        assert not first.success
        clock.after(30, lambda: story.say(2))
        with execute(story, first) as second:
            assert second.success
            (job,) = story.cluster.jobs.values()
            assert job["metadata"]["labels"]["dagster/run-id"] == second.run_id
    assert story.cluster.num_created == 1
    assert story.epochs == [(1, False), (1, False), (2, False)], "each run records the metrics once"


def test_job_that_finished_while_nobody_watched_is_adopted(story: Story) -> None:
    story.cluster.on_created = runs_and_succeeds(seconds=100)
    story.cluster.clock.after(20, story.evict)
    with execute(story) as first:
        story.cluster.clock.after(5, lambda: story.say(1, 2))
        story.cluster.clock.sleep(500)
        with execute(story, first) as second:
            assert second.success
    assert story.cluster.num_created == 1
    assert [epoch for epoch, _ in story.epochs] == [1, 2]


def test_job_that_failed_while_nobody_watched_is_replaced(story: Story) -> None:
    story.cluster.on_created = runs_and_succeeds(seconds=1000)
    story.cluster.clock.after(20, story.evict)
    with execute(story) as first:
        name = next(iter(story.cluster.jobs))
        story.cluster.condition(name, "Failed")
        story.cluster.on_created = runs_and_succeeds()
        with execute(story, first) as second:
            assert second.success
    assert story.cluster.num_created == 2
    assert name not in story.cluster.jobs
    assert story.cluster.most_active == 1


def test_cancelling_a_run_that_adopted_a_job_deletes_it(story: Story) -> None:
    story.cluster.on_created = runs_and_succeeds(seconds=3600)
    story.cluster.clock.after(20, story.evict)
    with execute(story) as first:
        story.cluster.clock.after(20, story.cancel)
        with execute(story, first) as second:
            run = story.instance.get_run_by_id(second.run_id)
            assert run
            assert run.status == dg.DagsterRunStatus.CANCELED
    assert (story.cluster.jobs, story.cluster.pods) == ({}, {})


def test_intended_reexecution_starts_a_new_job(story: Story) -> None:
    story.cluster.on_created = runs_and_succeeds()
    with execute(story) as first, execute(story, first, from_failure=False) as second:
        assert first.success
        assert second.success
    assert story.cluster.num_created == 2


def test_name_that_breaks_the_rule_is_refused_before_any_call(story: Story) -> None:
    calls: list[str] = []
    story.cluster.failing = calls.append

    @dg.asset(key=KEY)
    def trained(context: dg.AssetExecutionContext) -> None:
        story.client().run(context=context, config=story.config, name="Not_A_Name")

    result = dg.materialize([trained], instance=story.instance, raise_on_error=False)
    assert not result.success
    assert "DNS-1035" in str(story.failure_of(result))
    assert calls == []


def never_starts(cluster: FakeCluster, name: str) -> None:
    condition = {"type": "PodScheduled", "status": "False", "message": "0/1 nodes are available"}
    cluster.pods[name] = [pod_body(name, phase="Pending", conditions=[condition])]


@pytest.mark.parametrize(("status", "text"), [(403, "pytorchjobs is forbidden"), (500, "could not be removed within")])
def test_refused_clean_up_is_added_to_the_first_error(story: Story, status: int, text: str) -> None:
    def refuse(call: str) -> None:
        if call in ("delete", "delete pod"):
            raise api_error(status, "pytorchjobs is forbidden")

    story.cluster.on_created = never_starts
    story.cluster.failing = refuse
    description = str(story.failure_of(story.run()).user_failure_data.description)
    assert "(unschedulable)" in description.splitlines()[0]
    assert "0/1 nodes are available" in description
    assert text in description


def test_refused_clean_up_does_not_hide_a_cancellation(story: Story) -> None:
    def refuse(call: str) -> None:
        if call in ("delete", "delete pod"):
            raise api_error(403, "forbidden")

    story.cluster.on_created = runs_and_succeeds(seconds=3600)
    story.cluster.failing = refuse
    story.cluster.clock.after(20, story.cancel)
    with execute(story) as result:
        run = story.instance.get_run_by_id(result.run_id)
        assert run
        assert run.status == dg.DagsterRunStatus.CANCELED


def test_last_messages_that_cannot_be_handled_do_not_hide_the_failure(
    story: Story, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(self: object) -> None:
        raise ValueError("not a message")

    def act(cluster: FakeCluster, name: str) -> None:
        failing(137, "OOMKilled")(cluster, name)
        cluster.after_create = lambda: monkeypatch.setattr(PipesStoreMessageReader, "_poll", break_down)

    story.cluster.on_created = act
    monkeypatch.setattr(JobWatcher, "wait_until_finished", once_ticked(JobWatcher.wait_until_finished))
    description = str(story.failure_of(story.run()).user_failure_data.description)
    assert "out of memory" in description.splitlines()[0]
    assert "not a message" in description


def once_ticked(wait: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The wait, without its own reading of messages."""

    def wait_without_ticks(watcher: Any) -> Any:
        watcher.on_tick = lambda: None
        return wait(watcher)

    return wait_without_ticks


def test_closed_output_does_not_change_the_outcome(story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        def write(self, text: str) -> None:
            raise BrokenPipeError

        def flush(self) -> None: ...

    story.cluster.on_created = runs_and_succeeds(10, log="2026-01-01T00:00:00Z loss 0.5\n")
    monkeypatch.setattr("resources.kubernetes.logs.sys", SimpleNamespace(stdout=Closed()))
    assert story.run().success


def test_deleted_job_with_running_pods_gets_no_second_job(story: Story) -> None:
    beside: list[bool] = []

    def act(cluster: FakeCluster, name: str) -> None:
        beside.append(bool(cluster.pods))
        body = pod_body(name, container_statuses=[container_status(RUNNING)])
        body["metadata"]["labels"] |= cluster.jobs[name]["metadata"]["labels"]
        cluster.pods[name] = [body]
        if cluster.num_created == 1:
            cluster.clock.after(20, cluster.jobs.clear)
        else:
            cluster.clock.after(20, lambda: cluster.condition(name, "Succeeded"))

    story.cluster.on_created = act
    assert story.run().success
    assert beside == [False, False]


def test_job_whose_end_nobody_recorded_is_adopted_by_the_next_attempt(story: Story) -> None:
    def act(cluster: FakeCluster, name: str) -> None:
        cluster.pods[name] = [pod_body(name, phase="Succeeded")]
        cluster.condition(name, "Running")
        cluster.clock.after(2500, lambda: cluster.condition(name, "Succeeded"))

    story.cluster.on_created = act
    assert story.run().success
    assert story.cluster.num_created == 1
