"""Watching a job: it ends in bounded time, and a failure says why (twins of tests/cluster/test_stories.py)."""

import logging
from collections.abc import Callable
from typing import Any

import pytest

from resources.kubernetes.diagnosis import Cause, WatchLimits
from resources.kubernetes.errors import ApiRefusedError, ApiUnavailableError, ResourceDeletedError, ResourceFailedError
from resources.kubernetes.job import JobClient, JobState
from resources.kubernetes.watch import JobWatcher
from tests.unit.pytorch_job.fake_cluster import (
    PYTORCH_JOB,
    RUNNING,
    FakeCluster,
    api_error,
    container_status,
    pod_body,
    runs_and_succeeds,
    terminated,
)

LIMITS = WatchLimits(
    poll_interval_seconds=1,
    unschedulable_timeout_seconds=100,
    blocked_timeout_seconds=20,
    start_timeout_seconds=300,
    outage_timeout_seconds=60,
    final_exit_codes=(2,),
)


class Watched:
    def __init__(self, cluster: FakeCluster, client: JobClient[Any]):
        self.cluster = cluster
        self.client = client
        self.lines: list[str] = []
        self.ticks: list[float] = []

    def create(self, *act: Callable[[FakeCluster, str], None]) -> "Watched":
        if act:
            self.cluster.on_created = act[0]
        job = self.client.create({"metadata": {"name": "job", "namespace": "space"}})
        assert job
        self.job = job
        return self

    def wait(self):
        return JobWatcher(
            self.client,
            self.job,
            limits=LIMITS,
            on_log_line=lambda line: self.lines.append(f"{line.replica} {line.text}"),
            on_tick=lambda: self.ticks.append(self.cluster.clock()),
            clock=self.cluster.clock,
            sleeper=self.cluster.clock.sleep,
            logger=logging.getLogger("test"),
        ).wait_until_finished()

    def fails(self, cause: Cause, *texts: str) -> ResourceFailedError:
        with pytest.raises(ResourceFailedError) as caught:
            self.wait()
        assert caught.value.diagnosis.cause == cause
        for text in (f"{self.client.resource.kind} space/job", *texts):
            assert text in str(caught.value)
        return caught.value


@pytest.fixture
def watched(cluster: FakeCluster, client: JobClient[Any]) -> Watched:
    return Watched(cluster, client)


def pods_at(seconds: float, *bodies: dict[str, Any]) -> Callable[[FakeCluster, str], None]:
    def act(cluster: FakeCluster, name: str) -> None:
        cluster.clock.after(seconds, lambda: cluster.pods.__setitem__(name, list(bodies)))

    return act


def test_success_with_logs_and_ticks(watched: Watched) -> None:
    watched.create(runs_and_succeeds(seconds=5, log="2026-01-01T00:00:00Z epoch 1\n"))
    assert watched.wait().status.state.finished
    assert watched.lines == ["master-0 epoch 1"]
    assert len(watched.ticks) >= 5


def test_job_that_has_finished_already_is_seen_at_once(watched: Watched, cluster: FakeCluster) -> None:
    watched.create()
    cluster.condition("job", "Succeeded")
    watched.wait()
    assert watched.ticks == [cluster.clock()]


def test_failing_exit_code_with_the_lines_that_matter(watched: Watched, cluster: FakeCluster) -> None:
    status = container_status(terminated(3))
    watched.create(pods_at(2, pod_body("job", phase="Failed", container_statuses=[status])))
    cluster.logs["job-master-0"] = "2026-01-01T00:00:00Z ValueError: no such column\n"
    cluster.clock.after(3, lambda: cluster.condition("job", "Failed", "1 Master replica(s) failed"))
    error = watched.fails(Cause.EXIT_CODE, "exit code 3", "ValueError: no such column", "Master replica(s) failed")
    assert error.diagnosis.exit_code == 3
    assert error.transient


def test_permanent_exit_code_is_not_restarted(watched: Watched, cluster: FakeCluster) -> None:
    crashed = container_status({"waiting": {"reason": "CrashLoopBackOff"}}, restarts=1, last=terminated(2))
    watched.create(pods_at(0, pod_body("job", container_statuses=[crashed])))
    cluster.logs["job-master-0/previous"] = cluster.logs["job-master-0"] = "2026-01-01T00:00:00Z bad spec\n"
    error = watched.fails(Cause.EXIT_CODE, "exit code 2", "bad spec")
    assert error.diagnosis.remove
    assert cluster.clock() < 1005


def test_first_of_several_failures_is_the_cause(watched: Watched, cluster: FakeCluster) -> None:
    worker = pod_body(
        "job",
        "worker-0",
        phase="Failed",
        container_statuses=[container_status(terminated(137, "OOMKilled", "2026-01-01T00:00:10Z"))],
    )
    master = pod_body(
        "job", phase="Failed", container_statuses=[container_status(terminated(1, at="2026-01-01T00:00:12Z"))]
    )
    watched.create(pods_at(0, master, worker))
    cluster.logs["job-master-0"] = "2026-01-01T00:00:12Z connection closed by peer\n"
    cluster.clock.after(1, lambda: cluster.condition("job", "Failed"))
    error = watched.fails(Cause.OUT_OF_MEMORY, "worker-0/pytorch ended with exit code 137", "Raise `memory`")
    assert not error.transient
    assert "master-0/pytorch ended with exit code 1" in str(error)


def test_exit_of_a_pod_that_is_gone_is_remembered(watched: Watched, cluster: FakeCluster) -> None:
    crashed = container_status({"waiting": {"reason": "CrashLoopBackOff"}}, restarts=2, last=terminated(7))
    watched.create(pods_at(0, pod_body("job", container_statuses=[crashed])))
    cluster.clock.after(5, lambda: cluster.pods.clear())
    cluster.clock.after(6, lambda: cluster.condition("job", "Failed", "it has reached the specified backoff limit"))
    watched.fails(Cause.EXIT_CODE, "exit code 7", "backoff limit")


@pytest.mark.parametrize(
    ("pod", "cause", "text"),
    [
        (
            pod_body(
                "job",
                phase="Pending",
                conditions=[
                    {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes: cpu"}
                ],
            ),
            Cause.UNSCHEDULABLE,
            "0/1 nodes: cpu",
        ),
        *(
            (
                pod_body(
                    "job",
                    phase="Pending",
                    container_statuses=[container_status({"waiting": {"reason": reason, "message": "because"}})],
                ),
                cause,
                reason if cause == Cause.SLOW_START else f"{reason}: because",
            )
            for reason, cause in [
                ("ErrImagePull", Cause.IMAGE),
                ("ImagePullBackOff", Cause.IMAGE),
                ("InvalidImageName", Cause.IMAGE),
                ("ErrImageNeverPull", Cause.IMAGE),
                ("CreateContainerConfigError", Cause.CONFIGURATION),
                ("RunContainerError", Cause.NOT_STARTED),
                ("ContainerCreating", Cause.SLOW_START),
            ]
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_pod_that_cannot_start_is_given_up_after_its_own_limit(
    watched: Watched, cluster: FakeCluster, pod: dict[str, Any], cause: Cause, text: str
) -> None:
    watched.create(pods_at(0, pod))
    cluster.events["job-master-0"] = ["FailedMount: secret not found"]
    begin = cluster.clock()
    error = watched.fails(cause, text, "FailedMount: secret not found")
    assert LIMITS.of(cause) <= cluster.clock() - begin <= LIMITS.of(cause) + 3
    assert error.diagnosis.remove


def test_no_pods_at_all_shows_the_events_of_the_job(watched: Watched, cluster: FakeCluster) -> None:
    watched.create()
    cluster.events["job"] = ["FailedCreatePod: exceeded quota: cpu"]
    watched.fails(Cause.NO_PODS, "exceeded quota: cpu")


def test_temporary_obstacle_is_tolerated(watched: Watched, cluster: FakeCluster) -> None:
    waiting = container_status({"waiting": {"reason": "ErrImagePull", "message": ""}})
    watched.create(pods_at(0, pod_body("job", phase="Pending", container_statuses=[waiting])))
    running = pod_body("job", container_statuses=[container_status(RUNNING)])
    cluster.clock.after(15, lambda: cluster.pods.__setitem__("job", [running]))
    cluster.clock.after(500, lambda: cluster.condition("job", "Succeeded"))
    assert watched.wait().status.state.finished


def test_suspended_job_is_not_given_up(watched: Watched, cluster: FakeCluster) -> None:
    watched.create()
    cluster.condition("job", "Suspended")
    cluster.clock.after(2000, lambda: cluster.condition("job", "Succeeded"))
    assert watched.wait().status.state.finished


def test_what_a_suspension_ended_is_not_the_reason_of_a_later_failure(watched: Watched, cluster: FakeCluster) -> None:
    """Kueue preempts the job: its pods are told to end, and others continue when there is room again."""
    preempted = pod_body("job", container_statuses=[container_status(RUNNING)])
    watched.create(pods_at(0, preempted))
    cluster.condition("job", "Running")

    def suspend() -> None:
        cluster.condition("job", "Suspended")
        preempted["metadata"]["deletion_timestamp"] = "2026-01-01T00:00:00Z"
        preempted["status"] |= {"phase": "Failed", "container_statuses": [container_status(terminated(143))]}

    def resume() -> None:
        cluster.condition("job", "Running")
        failed = pod_body("job", phase="Failed", container_statuses=[container_status(terminated(3))])
        failed["metadata"] |= {"uid": "another", "name": "another-master-0"}
        cluster.pods["job"] = [preempted, failed]

    cluster.clock.after(10, suspend)
    cluster.clock.after(500, resume)
    cluster.clock.after(502, lambda: cluster.condition("job", "Failed"))
    error = watched.fails(Cause.EXIT_CODE, "exit code 3")
    assert "143" not in str(error)


def test_deadline_shows_what_the_replicas_were_doing(watched: Watched, cluster: FakeCluster) -> None:
    watched.create(runs_and_succeeds(seconds=1000, log="2026-01-01T00:00:00Z epoch 3 of 90\n"))
    cluster.clock.after(30, lambda: cluster.condition("job", "Failed", cluster.kind.deadline_message))
    watched.fails(Cause.DEADLINE, "active_deadline_seconds", "epoch 3 of 90")


def test_evicted_pod_is_named(watched: Watched, cluster: FakeCluster) -> None:
    pod = pod_body("job", phase="Failed", reason="Evicted", message="The node was low on resource: memory")
    watched.create(pods_at(0, pod))
    cluster.clock.after(2, lambda: cluster.condition("job", "Failed"))
    error = watched.fails(Cause.EVICTED, "low on resource: memory")
    assert error.transient


def test_failure_without_a_trace_still_gives_the_operators_words(watched: Watched, cluster: FakeCluster) -> None:
    watched.create()
    cluster.condition("job", "Failed", "managed elsewhere")
    watched.fails(Cause.UNKNOWN, "managed elsewhere")


@pytest.mark.parametrize("recreated", [False, True])
def test_job_deleted_by_someone_else(watched: Watched, cluster: FakeCluster, recreated: bool) -> None:
    watched.create(runs_and_succeeds(seconds=100))

    def delete() -> None:
        body = cluster.jobs.pop("job")
        if recreated:
            body["metadata"]["uid"] = "another"
            cluster.jobs["job"] = body

    cluster.clock.after(5, delete)
    with pytest.raises(ResourceDeletedError, match=r"space/job was deleted by someone else.*Running"):
        watched.wait()


def test_api_outage_shorter_than_the_limit_is_tolerated(watched: Watched, cluster: FakeCluster) -> None:
    watched.create(runs_and_succeeds(seconds=50))

    def fail(call: str) -> None:
        raise api_error(503, "away")

    cluster.clock.after(10, lambda: setattr(cluster, "failing", fail))
    cluster.clock.after(30, lambda: setattr(cluster, "failing", lambda call: None))
    watched.wait()
    assert len(watched.ticks) >= 45


def test_api_outage_longer_than_the_limit_ends_the_watch(watched: Watched, cluster: FakeCluster) -> None:
    watched.create(runs_and_succeeds(seconds=500))

    def fail(call: str) -> None:
        raise api_error(503, "away")

    cluster.clock.after(10, lambda: setattr(cluster, "failing", fail))
    with pytest.raises(ApiUnavailableError, match="away"):
        watched.wait()
    assert cluster.clock() - 1000 <= 10 + LIMITS.outage_timeout_seconds + 2


def fail_on(cluster: FakeCluster, *calls: str, status: int = 500, seconds: float | None = None) -> None:
    def fail(call: str) -> None:
        if call in calls:
            raise api_error(status, "no")

    cluster.failing = fail
    if seconds is not None:
        cluster.clock.after(seconds, lambda: setattr(cluster, "failing", lambda call: None))


@pytest.mark.parametrize("status", [403, 404, 410, 500, 503])
@pytest.mark.parametrize("call", ["log", "events", "list pods"])
def test_failed_diagnostics_do_not_change_the_outcome(
    watched: Watched, cluster: FakeCluster, call: str, status: int
) -> None:
    watched.create(runs_and_succeeds(seconds=2000, log="2026-01-01T00:00:00Z epoch 1\n"))
    fail_on(cluster, call, status=status)
    assert watched.wait().status.state == JobState.SUCCEEDED


@pytest.mark.parametrize("status", [403, 500])
def test_log_that_cannot_be_read_does_not_hide_the_cause_of_a_failure(
    watched: Watched, cluster: FakeCluster, status: int
) -> None:
    ended = container_status(terminated(3))
    watched.create(pods_at(0, pod_body("job", phase="Failed", container_statuses=[ended])))
    cluster.clock.after(20, lambda: cluster.condition("job", "Failed"))
    fail_on(cluster, "log", "events", status=status)
    watched.fails(Cause.EXIT_CODE, "exit code 3")
    assert cluster.clock() < 1000 + 60


def test_last_lines_are_read_again_for_a_short_time(watched: Watched, cluster: FakeCluster) -> None:
    ended = container_status(terminated(3))
    watched.create()
    cluster.pods["job"] = [pod_body("job", phase="Failed", container_statuses=[ended])]
    cluster.logs["job-master-0"] = "2026-01-01T00:00:00Z ValueError: no such column\n"
    cluster.condition("job", "Failed")
    fail_on(cluster, "log", seconds=8)
    watched.fails(Cause.EXIT_CODE, "ValueError: no such column")


@pytest.mark.parametrize("status", [403, 404, 409, 410, 500, 507])
def test_answer_that_says_nothing_about_the_job_does_not_end_the_watch(
    watched: Watched, cluster: FakeCluster, status: int
) -> None:
    watched.create(runs_and_succeeds(seconds=100))
    cluster.clock.after(10, lambda: fail_on(cluster, "get", status=status, seconds=30))
    assert watched.wait().status.state == JobState.SUCCEEDED


def test_persistent_refusal_ends_the_watch(watched: Watched, cluster: FakeCluster) -> None:
    watched.create(runs_and_succeeds(seconds=500))
    cluster.clock.after(10, lambda: fail_on(cluster, "get", status=403))
    with pytest.raises(ApiRefusedError, match="Role that allows it"):
        watched.wait()
    assert cluster.clock() - 1000 <= 10 + LIMITS.outage_timeout_seconds + 2


def succeeds_without_the_operator(cluster: FakeCluster, name: str) -> None:
    """A PyTorchJob ends with its master, a TrainJob with the last of its nodes."""
    ended = container_status(terminated(0, "Completed"))
    worker = ("Running", container_status(RUNNING)) if cluster.kind is PYTORCH_JOB else ("Succeeded", ended)
    cluster.pods[name] = [
        pod_body(name, phase="Succeeded", container_statuses=[ended]),
        pod_body(name, "worker-0", phase=worker[0], container_statuses=[worker[1]]),
    ]
    cluster.condition(name, "Running")


def test_pods_that_ended_while_the_operator_is_away_end_the_watch(watched: Watched, cluster: FakeCluster) -> None:
    watched.create(succeeds_without_the_operator)
    error = watched.fails(Cause.OPERATOR_AWAY, "master-0: it ended as Succeeded", watched.client.operator, "adopts it")
    assert LIMITS.start_timeout_seconds <= cluster.clock() - 1000 <= LIMITS.start_timeout_seconds + 3
    assert not error.diagnosis.remove, "the job is not removed"
    assert error.transient


@pytest.mark.parametrize(("seconds", "warns"), [(3, False), (250, True)])
def test_operator_that_comes_back_in_time_is_waited_for(
    watched: Watched, cluster: FakeCluster, caplog: pytest.LogCaptureFixture, seconds: float, warns: bool
) -> None:
    watched.create(succeeds_without_the_operator)
    cluster.clock.after(seconds, lambda: cluster.condition("job", "Succeeded"))
    assert watched.wait().status.state == JobState.SUCCEEDED
    assert ("the operator has not recorded it" in caplog.text) is warns


def test_worker_may_end_before_its_master(watched: Watched, cluster: FakeCluster) -> None:
    master = pod_body("job", container_statuses=[container_status(RUNNING)])
    watched.create(pods_at(0, master, pod_body("job", "worker-0", phase="Succeeded")))
    cluster.clock.after(2000, lambda: cluster.condition("job", "Succeeded"))
    assert watched.wait().status.state == JobState.SUCCEEDED


def alternating(cluster: FakeCluster, *bodies: dict[str, Any], every: float, times: int) -> None:
    for n in range(times):
        body = bodies[n % len(bodies)]
        cluster.clock.after(n * every, lambda body=body: cluster.pods.__setitem__("job", [body]))


def waiting(reason: str) -> dict[str, Any]:
    status = container_status({"waiting": {"reason": reason, "message": ""}})
    return pod_body("job", phase="Pending", container_statuses=[status])


NO_NODE = {"type": "PodScheduled", "status": "False", "message": "0/1 nodes"}


@pytest.mark.parametrize(
    "other",
    [
        waiting("ContainerCreating"),
        pod_body("job", phase="Pending", conditions=[NO_NODE]),
        pod_body("job", container_statuses=[container_status(RUNNING)]),
    ],
    ids=["creating", "unschedulable", "running"],
)
def test_pod_that_flaps_is_given_up(watched: Watched, cluster: FakeCluster, other: dict[str, Any]) -> None:
    watched.create()
    alternating(cluster, waiting("ErrImagePull"), other, every=5, times=400)
    watched.fails(Cause.IMAGE, "ErrImagePull (for 2")
    assert cluster.clock() - 1000 < 3 * LIMITS.blocked_timeout_seconds


def test_old_obstacles_are_forgotten(watched: Watched, cluster: FakeCluster) -> None:
    """Preempted now and then, it waits for a node again, and trains for long in between."""
    watched.create()
    running = pod_body("job", container_statuses=[container_status(RUNNING)])
    unschedulable = pod_body("job", phase="Pending", conditions=[NO_NODE])
    for n in range(5):
        cluster.clock.after(1000 * n, lambda: cluster.pods.__setitem__("job", [unschedulable]))
        cluster.clock.after(1000 * n + 50, lambda: cluster.pods.__setitem__("job", [running]))
    cluster.clock.after(5000, lambda: cluster.condition("job", "Succeeded"))
    assert watched.wait().status.state == JobState.SUCCEEDED


def test_job_that_outlives_its_deadline_is_given_up(watched: Watched, cluster: FakeCluster) -> None:
    """The operator is gone, and the node that would end the pod as well."""
    watched.create(runs_and_succeeds(seconds=100_000))
    cluster.jobs["job"]["spec"] = dict(cluster.kind.deadline_spec)
    cluster.clock.after(500, lambda: cluster.condition("job", "Suspended"))
    cluster.clock.after(5000, lambda: cluster.condition("job", "Running"))
    error = watched.fails(Cause.DEADLINE, "still Running", "its deadline is 1000 s")
    assert 6298 <= cluster.clock() - 1000 <= 6310, "the time for which it was suspended does not count"
    assert error.diagnosis.remove
