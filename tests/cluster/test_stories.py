"""The Pipes client of each kind of job on a real cluster with the real operators."""

import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import dagster as dg
import pytest
from kubernetes import client as k8s

from resources.kubernetes.api import load_configuration
from resources.kubernetes.job import JobClient, JobState
from tests.cluster.conftest import Minio
from tests.cluster.kinds import PYTORCH_JOB, TRAIN_JOB, JobKind, brief
from tests.cluster.kubectl import PATIENCE, kubectl, wait_for
from tests.cluster.proxy import Proxy
from tests.cluster.story import LIMITS, ClusterStory


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    return tmp_path


@pytest.fixture
def story(
    kind: JobKind, namespace: str, core: Any, jobs: JobClient[Any], minio: Minio, home: Path, no_jobs_left: None
) -> Iterator[ClusterStory]:
    with dg.DagsterInstance.from_config(str(home)) as instance:
        yield ClusterStory(kind, namespace, core, jobs, minio, instance)


@brief
def test_success(story: ClusterStory) -> None:
    with story.run(story.config("epochs", "4")) as result:
        assert result.success
        assert result.asset_materializations_for_node("trained")[0].metadata["epochs"].value == 4
    assert story.epochs == [(epoch, False) for epoch in range(4)]
    assert [line for line in story.lines if "epoch" in line] == [
        f"{story.kind.replicas[0]}: rank 0 epoch {i}" for i in range(4)
    ]


def test_metrics_and_logs_arrive_while_the_job_runs(story: ClusterStory) -> None:
    seen: list[int] = []
    story.when(lambda: len(story.epochs) >= 2 and len(story.lines) >= 2, lambda: seen.append(len(story.epochs)))
    with story.run(story.config("epochs", "20")) as result:
        assert result.success
    assert seen
    assert seen[0] < 20


@brief
def test_one_master_and_two_workers(story: ClusterStory) -> None:
    with story.run(story.config("peers", "3", replicas=3)) as result:
        assert result.success
    first, *others = story.kind.replicas
    assert f"{first}: rank 0 was greeted by [1, 2]" in story.lines
    assert {f"{other}: rank {rank} greeted" for rank, other in enumerate(others, 1)} <= set(story.lines)


def test_failing_exit_code(story: ClusterStory) -> None:
    error = story.failure(story.config("fail", "3", once=True))
    assert "ended with exit code 3" in error
    assert "ValueError: the data has 11 classes, expected 10" in error


def test_crash_at_import(story: ClusterStory) -> None:
    error = story.failure(story.config("crash", once=True))
    assert "ModuleNotFoundError: No module named 'no_such_module'" in error


@pytest.mark.parametrize("kind", [PYTORCH_JOB], indirect=True, ids=["PyTorchJob"])
def test_backoff_limit_bounds_the_restarts(story: ClusterStory) -> None:
    error = story.failure(story.config("fail", "3", backoff_limit=1))
    assert "ended with exit code 3" in error
    assert "ValueError: the data has 11 classes" in error


@brief
def test_out_of_memory(story: ClusterStory) -> None:
    error = story.failure(story.config("memory", "16", once=True, memory="64Mi"))
    assert "out of memory" in error
    assert "exit code 137" in error
    assert "Raise `memory`" in error
    assert "took 16 MiB" in error


def test_worker_failure_is_the_reported_error(story: ClusterStory) -> None:
    config = story.config("fail", "7", replicas=2, once=True)
    assert "ended with exit code 7" in story.failure(config)


@brief
def test_missing_image(story: ClusterStory) -> None:
    error = story.failure(story.config("epochs", "1", image="localhost/never-loaded:1"))
    assert "image not pulled" in error
    assert "localhost/never-loaded:1" in error
    waited = re.search(r"\(for (\d+) s\)", error)
    assert waited
    assert LIMITS.blocked_timeout_seconds <= int(waited[1]) < LIMITS.start_timeout_seconds
    assert (story.names(), story.pods()) == ([], [])


@brief
def test_unschedulable(story: ClusterStory) -> None:
    error = story.failure(story.config("epochs", "1", node_selector={"no-such": "node"}))
    assert "unschedulable" in error
    assert "node" in error
    assert (story.names(), story.pods()) == ([], [])


def test_missing_secret(story: ClusterStory) -> None:
    error = story.failure(story.config("epochs", "1", secret_env={"KEY": {"secret": "no-such-secret", "key": "key"}}))
    assert "pod configuration" in error
    assert 'secret "no-such-secret" not found' in error
    assert (story.names(), story.pods()) == ([], [])


def test_deadline_exceeded(story: ClusterStory) -> None:
    error = story.failure(story.config("epochs", "600", deadline_seconds=25))
    assert "deadline exceeded" in error
    assert "rank 0 epoch" in error


def test_command_that_does_not_exist(story: ClusterStory) -> None:
    error = story.failure(story.config(command=["/no/such/program"], once=True))
    assert "/no/such/program" in error


REFUSED = {
    PYTORCH_JOB.name: ({"extra_spec": {"pytorchReplicaSpecs": {"Master": {"replicas": 2}}}}, "must be 1"),
    TRAIN_JOB.name: ({"runtime": "no-such-runtime"}, "no-such-runtime"),
}


def test_refused_by_the_admission_webhook(story: ClusterStory) -> None:
    settings, text = REFUSED[story.kind.name]
    error = story.failure(story.config("epochs", "1", **settings))
    assert text in error
    assert story.names() == []


def test_no_permission(story: ClusterStory) -> None:
    api = k8s.ApiClient(story.core.api_client.configuration)
    api.set_default_header("Impersonate-User", f"system:serviceaccount:{story.namespace}:nobody")
    story.client = story.kind.client(k8s.CustomObjectsApi(api), k8s.CoreV1Api(api))
    error = story.failure(story.config("epochs", "1"))
    assert "system:serviceaccount" in error
    assert "Role" in error


def test_kind_that_is_not_installed(story: ClusterStory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(story.kind.client, "plural", "jobsofanotherversion")
    error = story.failure(story.config("epochs", "1"))
    assert f"install {story.kind.client.operator}" in error


@brief
@pytest.mark.parametrize("moment", ["created", "running", "image pull", "ignoring SIGTERM"])
def test_cancel(story: ClusterStory, moment: str) -> None:
    """Job and pods are gone long before the end of the work and of the pods' grace period."""
    program = "deaf" if moment == "ignoring SIGTERM" else "epochs"
    config = story.config(program, "600", termination_grace_seconds=300)
    if moment == "image pull":
        config = story.config("epochs", "1", image="localhost/never-loaded:1")
        story.limits = replace(LIMITS, blocked_timeout_seconds=300)
    conditions = {
        "created": story.names,
        "image pull": lambda: any(
            status.state.waiting and "Image" in (status.state.waiting.reason or "")
            for pod in story.pods()
            for status in pod.status.container_statuses or ()
        ),
        "running": story.running,
        "ignoring SIGTERM": story.running,
    }
    story.when(conditions[moment], story.cancel)
    with story.run(config) as result:
        assert story.status(result) == dg.DagsterRunStatus.CANCELED
    wait_for("removal", lambda: not story.names() and not story.pods(), 60)


@brief
def test_killed_run_worker(story: ClusterStory, home: Path) -> None:
    config = story.config("epochs", "20")
    worker = story.in_another_process(config, home)
    wait_for("the first message", story.is_heard)
    (name,) = story.names()
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    (run,) = story.instance.get_runs()
    story.instance.report_run_failed(run)  # as run monitoring does
    with story.run(config, parent=run.run_id) as result:
        assert result.success
        assert result.asset_materializations_for_node("trained")[0].metadata["epochs"].value == 20
    assert story.names() == [name]
    assert story.metadata[f"{story.kind.key}_adopted"].value is True
    assert [epoch for epoch, replayed in story.epochs if not replayed] == list(range(20))


def test_job_finished_while_unobserved(story: ClusterStory, home: Path) -> None:
    config = story.config("epochs", "5")
    worker = story.in_another_process(config, home)
    wait_for("the job", story.names)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    (name,) = story.names()
    wait_for("the job to end", lambda: _state(story, name) == JobState.SUCCEEDED)
    (run,) = story.instance.get_runs()
    story.instance.report_run_failed(run)
    with story.run(config, parent=run.run_id) as result:
        assert result.success
    assert story.names() == [name]
    assert [epoch for epoch, _ in story.epochs] == list(range(5))


def test_job_failed_while_unobserved(story: ClusterStory, home: Path) -> None:
    config = story.config("fail", "3", once=True)
    worker = story.in_another_process(config, home)
    assert worker.wait(300) == 1
    (name,) = story.names()
    (run,) = story.instance.get_runs()
    with story.run(config, parent=run.run_id) as result:
        assert not result.success
    assert len(story.names()) == 1
    assert story.names() != [name]


def test_evicted_run_worker(story: ClusterStory, home: Path) -> None:
    config = story.config("epochs", "20")
    worker = story.in_another_process(config, home)
    wait_for("the first message", story.is_heard)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(300) != 0
    (run,) = story.instance.get_runs()
    with story.run(config, parent=run.run_id) as result:
        assert result.success
    assert story.metadata[f"{story.kind.key}_adopted"].value is True
    assert len(story.names()) == 1


def delete_pod(story: ClusterStory) -> None:
    kubectl("-n", story.namespace, "delete", "pod", story.pods()[0].metadata.name, "--grace-period=1")


@pytest.mark.parametrize("kind", [PYTORCH_JOB], indirect=True, ids=["PyTorchJob"])
def test_pod_deleted_during_the_run(story: ClusterStory) -> None:
    story.when(lambda: len(story.epochs) >= 3, lambda: delete_pod(story))
    with story.run(story.config("epochs", "15")) as result:
        assert result.success
    assert [epoch for epoch, _ in story.epochs][-15:] == list(range(15))
    assert len(story.epochs) > 15, "the second process said its epochs again"


@pytest.mark.thorough
@pytest.mark.parametrize("kind", [TRAIN_JOB], indirect=True, ids=["TrainJob"])
def test_node_deleted_during_the_run_is_a_failure_worth_a_retry(story: ClusterStory) -> None:
    config = story.config("epochs", "15")
    story.when(lambda: len(story.epochs) >= 3, lambda: delete_pod(story))
    with story.run(config) as first:
        assert not first.success
        (event,) = [event for event in first.all_node_events if event.is_step_failure]
        failure = event.step_failure_data.user_failure_data
        assert failure
        assert "killed" in str(failure.description)
    with story.run(config, parent=first) as second:
        assert second.success
    assert len(story.names()) == 1


def test_operator_restarted(story: ClusterStory) -> None:
    def restart() -> None:
        kubectl("-n", namespace, "rollout", "restart", f"deploy/{operator}")

    namespace, operator = story.kind.operator

    story.when(story.running, restart)
    with story.run(story.config("epochs", "15")) as result:
        assert result.success
    assert len(story.names()) == 1
    kubectl("-n", namespace, "rollout", "status", f"deploy/{operator}", PATIENCE)


def scale_operator(kind: JobKind, replicas: int) -> None:
    namespace, operator = kind.operator
    kubectl("-n", namespace, "scale", f"deploy/{operator}", f"--replicas={replicas}")


@pytest.fixture
def operator_returns(kind: JobKind) -> Iterator[None]:
    yield
    scale_operator(kind, 1)
    namespace, operator = kind.operator
    kubectl("-n", namespace, "rollout", "status", f"deploy/{operator}", PATIENCE)


def test_operator_down_until_after_the_end(story: ClusterStory, operator_returns: None) -> None:
    config = story.config("epochs", "30")
    story.limits = replace(LIMITS, start_timeout_seconds=40)
    story.when(story.running, lambda: scale_operator(story.kind, 0))
    with story.run(config) as first:
        assert not first.success
        (event,) = [event for event in first.all_node_events if event.is_step_failure]
        failure = event.step_failure_data.user_failure_data
        assert failure
        assert "operator away" in str(failure.description)
        assert f"{story.kind.replicas[0]}: it ended as Succeeded" in str(failure.description)
    (name,) = story.names()
    scale_operator(story.kind, 1)
    story.limits = LIMITS
    with story.run(config, parent=first) as second:
        assert second.success
    assert story.names() == [name]
    assert story.metadata[f"{story.kind.key}_adopted"].value is True


def test_job_deleted_while_its_pod_keeps_running(story: ClusterStory) -> None:
    config = story.config("epochs", "300")

    def orphan() -> None:
        kubectl("-n", story.namespace, "delete", story.kind.client.plural, *story.names(), "--cascade=orphan")

    story.when(lambda: len(story.epochs) >= 2, orphan)
    with story.run(config) as first:
        assert not first.success
    (pod,) = story.pods()
    assert pod.status.phase == "Running", "the pod outlived its job"
    numbers_of_pods: list[int] = []
    ended = threading.Event()

    def count() -> None:
        while not ended.wait(0.2):
            numbers_of_pods.append(len(story.pods()))

    counter = threading.Thread(target=count, daemon=True)
    counter.start()
    with story.run(story.config("epochs", "5"), parent=first) as second:
        assert second.success
    ended.set()
    counter.join(10)
    assert max(numbers_of_pods) == 1, "a second pod ran beside the first"
    assert [each.metadata.uid for each in story.pods()] != [pod.metadata.uid]


def test_unreadable_logs_and_events_do_not_change_the_outcome(story: ClusterStory) -> None:
    inside = ["-n", story.namespace, "create"]
    verbs = "--verb=create,get,list,patch,delete"
    client = story.kind.client
    resources = ",".join([f"{client.plural}.{client.group}", *story.kind.dependents, "pods"])
    kubectl(*inside, "role", "no-logs", verbs, f"--resource={resources}")
    kubectl(*inside, "rolebinding", "no-logs", "--role=no-logs", f"--serviceaccount={story.namespace}:no-logs")
    api = k8s.ApiClient(story.core.api_client.configuration)
    api.set_default_header("Impersonate-User", f"system:serviceaccount:{story.namespace}:no-logs")
    story.client = story.kind.client(k8s.CustomObjectsApi(api), k8s.CoreV1Api(api))
    with story.run(story.config("epochs", "3")) as result:
        assert result.success
    assert (len(story.epochs), story.lines) == (3, [])
    assert "ended with exit code 3" in story.failure(story.config("fail", "3", once=True))


def test_object_store_outage_during_the_run(story: ClusterStory) -> None:
    def away() -> None:
        story.minio.scale(0)
        kubectl("-n", story.namespace, "wait", "--for=delete", "pod", "-l", "app=minio", PATIENCE)
        time.sleep(12)
        story.minio.scale(1)
        story.minio.wait_until_ready()

    thread = story.when(lambda: len(story.epochs) >= 3, away)
    with story.run(story.config("epochs", "15")) as result:
        thread.join(300)
        assert result.success
    assert [epoch for epoch, _ in story.epochs] == list(range(15))


@brief
def test_api_server_outage_during_the_run(story: ClusterStory) -> None:
    """The API server is unreachable for the run worker only; the job continues."""
    configuration: Any = load_configuration()[0]
    server = urlsplit(configuration.host)
    assert server.hostname
    with Proxy.before(server.hostname, server.port or 443) as proxy:
        configuration.tls_server_name = configuration.tls_server_name or server.hostname
        configuration.host = f"https://127.0.0.1:{proxy.port}"
        api = k8s.ApiClient(configuration)
        story.client = story.kind.client(k8s.CustomObjectsApi(api), k8s.CoreV1Api(api))
        thread = story.when(lambda: len(story.epochs) >= 3, lambda: proxy.be_away(20))
        with story.run(story.config("epochs", "15")) as result:
            thread.join(300)
            assert result.success
        assert proxy.num_refused > 0
    assert [epoch for epoch, _ in story.epochs] == list(range(15))
    assert len(story.names()) == 1


def _state(story: ClusterStory, name: str) -> JobState | None:
    job = story.jobs.get(story.namespace, name)
    return job.status.state if job else None
