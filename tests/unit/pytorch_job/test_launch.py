"""Exactly one job for a step, whatever earlier attempts left."""

import logging
from dataclasses import replace
from typing import Any

import pytest

from resources.kubernetes.errors import ApiRefusedError, ApiUnavailableError, ResourceConflictError, ResourceStuckError
from resources.kubernetes.job import JobClient
from resources.kubernetes.launch import JobLauncher, JobRequest
from resources.kubernetes.naming import MANAGED_BY_LABEL, RUN_ID_LABEL
from resources.pytorch_job.client import PyTorchJob
from tests.unit.pytorch_job.fake_cluster import FakeCluster, api_error, pod_body

REQUEST = JobRequest(
    PyTorchJob,
    name="job-0",
    namespace="space",
    step_key="step",
    run_id="run-1",
    ancestor_run_ids=(),
    work="digest",
    launch_id="1st",
)


def manifest(request: JobRequest) -> dict[str, Any]:
    return {
        "metadata": {
            "name": request.name,
            "namespace": request.namespace,
            "labels": request.labels,
            "annotations": request.annotations,
        }
    }


@pytest.fixture
def launcher(client: JobClient[Any], cluster: FakeCluster) -> JobLauncher:
    return JobLauncher(
        client, clock=cluster.clock, sleeper=cluster.clock.sleep, logger=logging.getLogger("test"), outage_seconds=60
    )


def start(launcher: JobLauncher, request: JobRequest = REQUEST):
    request = replace(request, kind=launcher.client.resource)
    return launcher.start(request, manifest(request))


def remove(launcher: JobLauncher) -> None:
    request = replace(REQUEST, kind=launcher.client.resource)
    launcher.remove(request, grace_seconds=5, timeout_seconds=25)


def retry(request: JobRequest = REQUEST, **changes: Any) -> JobRequest:
    return replace(request, **{"name": "job-1", "launch_id": "2nd", **changes})


def test_creates_a_job_when_none_exists(launcher: JobLauncher, cluster: FakeCluster) -> None:
    started = start(launcher)
    assert not started.adopted
    assert started.found.name == "job-0"
    assert cluster.num_created == 1


@pytest.mark.parametrize("condition", [None, "Created", "Running", "Restarting", "Suspended", "Succeeded"])
def test_retry_adopts_a_job_that_runs_or_succeeded(
    launcher: JobLauncher, cluster: FakeCluster, condition: str | None
) -> None:
    first = start(launcher)
    if condition:
        cluster.condition("job-0", condition)
    again = start(launcher, retry())
    assert again.adopted
    assert (again.found.uid, again.found.launch_id) == (first.found.uid, "1st")
    assert cluster.num_created == 1


def test_failed_job_is_gone_with_its_pods_before_the_next_is_created(
    launcher: JobLauncher, cluster: FakeCluster
) -> None:
    start(launcher)
    cluster.condition("job-0", "Failed")
    cluster.pods["job-0"] = [pod_body("job-0", "worker-0")]
    seen: list[bool] = []
    cluster.before_create = lambda: seen.append("job-0" in cluster.pods)
    again = start(launcher, retry())
    assert not again.adopted
    assert seen == [False]
    assert list(cluster.jobs) == ["job-1"]
    assert cluster.most_active == 1


def test_failed_job_of_the_same_attempt_is_replaced_under_the_same_name(
    launcher: JobLauncher, cluster: FakeCluster
) -> None:
    start(launcher)
    cluster.condition("job-0", "Failed")
    again = start(launcher, replace(REQUEST, launch_id="2nd"))
    assert not again.adopted
    assert again.found.launch_id == "2nd"
    assert cluster.num_created == 2


def test_running_job_that_computes_something_else_is_replaced(launcher: JobLauncher, cluster: FakeCluster) -> None:
    start(launcher)
    cluster.condition("job-0", "Running")
    again = start(launcher, retry(work="other digest"))
    assert not again.adopted
    assert list(cluster.jobs) == ["job-1"]
    assert cluster.most_active == 1


def test_job_that_is_being_deleted_is_waited_for(launcher: JobLauncher, cluster: FakeCluster) -> None:
    start(launcher)
    cluster.jobs["job-0"]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    again = start(launcher, retry())
    assert again.found.name == "job-1"
    assert cluster.most_active == 1


def test_retried_run_adopts_its_parents_job_and_takes_it_over(launcher: JobLauncher, cluster: FakeCluster) -> None:
    start(launcher)
    child = retry(run_id="run-2", ancestor_run_ids=("run-1",))
    again = start(launcher, child)
    assert again.adopted
    assert again.found.run_id == "run-2"
    grandchild = retry(run_id="run-3", ancestor_run_ids=("run-2", "run-1"))
    assert start(launcher, grandchild).adopted
    assert cluster.num_created == 1


def test_unrelated_run_and_other_step_start_their_own(launcher: JobLauncher, cluster: FakeCluster) -> None:
    start(launcher)
    start(launcher, retry(run_id="run-2"))
    start(launcher, retry(name="job-2", step_key="other"))
    assert cluster.num_created == 3
    assert len(cluster.jobs) == 3


def test_of_two_jobs_the_newer_stays(launcher: JobLauncher, cluster: FakeCluster, client: JobClient[Any]) -> None:
    start(launcher)
    cluster.clock.sleep(5)
    client.create(manifest(retry(kind=client.resource)))
    again = start(launcher, retry(name="job-2", launch_id="3rd"))
    assert again.found.name == "job-1"
    assert list(cluster.jobs) == ["job-1"]


def test_foreign_job_of_the_same_name_is_left_alone(
    launcher: JobLauncher, cluster: FakeCluster, client: JobClient[Any]
) -> None:
    client.create({"metadata": {"name": "job-0", "namespace": "space", "labels": {RUN_ID_LABEL: "someone"}}})
    with pytest.raises(ResourceConflictError, match=r"space/job-0 exists and is not this step's.*'someone'"):
        start(launcher)
    assert list(cluster.jobs) == ["job-0"]


def test_create_whose_answer_was_lost_makes_one_job(launcher: JobLauncher, cluster: FakeCluster) -> None:
    def lose_answer() -> None:
        cluster.after_create = lambda: None
        raise TimeoutError("no answer")

    cluster.after_create = lose_answer
    started = start(launcher)
    assert started.found.launch_id == "1st"
    assert cluster.num_created == 1


def test_api_outage_is_tolerated_until_its_limit(launcher: JobLauncher, cluster: FakeCluster) -> None:
    def fail(call: str) -> None:
        raise api_error(503, "away")

    cluster.failing = fail
    cluster.clock.after(20, lambda: setattr(cluster, "failing", lambda call: None))
    start(launcher)
    cluster.failing = fail
    with pytest.raises(ApiUnavailableError, match="away"):
        start(launcher, retry())


def test_refusal_is_not_retried(launcher: JobLauncher, cluster: FakeCluster) -> None:
    calls: list[str] = []

    def fail(call: str) -> None:
        calls.append(call)
        raise api_error(403, "forbidden")

    cluster.failing = fail
    with pytest.raises(ApiRefusedError):
        start(launcher)
    assert len(calls) == 1


def test_pods_that_do_not_go_away_stop_the_replacement(launcher: JobLauncher, cluster: FakeCluster) -> None:
    start(launcher)
    cluster.condition("job-0", "Failed")
    cluster.pods["job-0"] = [pod_body("job-0")]
    cluster._remove_pods = lambda job: None
    cluster.delete_namespaced_pod = lambda *_, **__: None
    with pytest.raises(ResourceStuckError, match=r"pod job-0-master-0.* still exist"):
        start(launcher, retry())
    assert cluster.num_created == 1


def test_removal_takes_job_and_pods_within_the_short_grace_time(launcher: JobLauncher, cluster: FakeCluster) -> None:
    start(launcher)
    cluster.pods["job-0"] = [pod_body("job-0")]
    begin = cluster.clock()
    remove(launcher)
    assert (cluster.jobs, cluster.pods) == ({}, {})
    assert cluster.clock() - begin < 10
    assert cluster.deleted_pod_graces == [5]


def test_pods_are_asked_before_the_garbage_collector_asks_them_with_their_own_grace_time(
    launcher: JobLauncher, cluster: FakeCluster
) -> None:
    start(launcher)
    cluster.pods["job-0"] = [pod_body("job-0")]
    calls: list[str] = []
    cluster.failing = calls.append
    remove(launcher)
    assert calls.index("delete pod") < calls.index("delete")


def test_removal_leaves_a_foreign_job_of_the_same_name_and_its_pods_alone(
    launcher: JobLauncher, cluster: FakeCluster, client: JobClient[Any]
) -> None:
    client.create({"metadata": {"name": "job-0", "namespace": "space", "labels": {RUN_ID_LABEL: "someone"}}})
    cluster.pods["job-0"] = [pod_body("job-0")]
    remove(launcher)
    assert (list(cluster.jobs), list(cluster.pods)) == (["job-0"], ["job-0"])


def test_removal_catches_a_job_that_appears_late(
    launcher: JobLauncher, cluster: FakeCluster, client: JobClient[Any]
) -> None:
    """The create call times out, the step is cancelled before it tries again, and the job is stored after that."""

    def lose(call: str) -> None:
        if call == "create":
            cluster.failing = lambda call: None
            cluster.clock.after(0.5, cancel)
            cluster.clock.after(6, lambda: client.create(manifest(replace(REQUEST, kind=client.resource))))
            raise TimeoutError("no answer in 10 s")

    def cancel() -> None:
        raise KeyboardInterrupt

    cluster.failing = lose
    with pytest.raises(KeyboardInterrupt):
        start(launcher)
    remove(launcher)
    assert cluster.num_created == 1
    assert cluster.jobs == {}


def test_removal_says_when_it_ran_out_of_time(launcher: JobLauncher, cluster: FakeCluster) -> None:
    def fail(call: str) -> None:
        raise api_error(503)

    cluster.failing = fail
    with pytest.raises(ResourceStuckError, match="could not be removed within 25 s"):
        remove(launcher)


def orphaned_pod(cluster: FakeCluster, request: JobRequest, phase: str = "Running") -> None:
    """What `kubectl delete pytorchjob --cascade=orphan` leaves."""
    body = pod_body(request.name, phase=phase)
    body["metadata"]["labels"] |= replace(request, kind=cluster.kind.job).labels
    cluster.pods[request.name] = [body]


@pytest.mark.parametrize(
    "next_request", [replace(REQUEST, launch_id="2nd"), retry(), retry(work="other digest")], ids=str
)
def test_pods_whose_job_vanished_are_gone_before_the_next_is_created(
    launcher: JobLauncher, cluster: FakeCluster, next_request: JobRequest
) -> None:
    start(launcher)
    cluster.jobs.clear()
    orphaned_pod(cluster, REQUEST)
    seen: list[bool] = []
    cluster.before_create = lambda: seen.append(bool(cluster.pods))
    assert not start(launcher, next_request).adopted
    assert seen == [False]
    assert list(cluster.jobs) == [next_request.name]


def test_pods_whose_job_vanished_are_removed_beside_a_job_that_is_adopted(
    launcher: JobLauncher, cluster: FakeCluster
) -> None:
    start(launcher)
    orphaned_pod(cluster, replace(REQUEST, name="job-9"))
    assert start(launcher, retry()).adopted
    assert cluster.pods == {}


def test_pods_of_another_run_or_step_are_left_alone(launcher: JobLauncher, cluster: FakeCluster) -> None:
    orphaned_pod(cluster, replace(REQUEST, name="job-8", run_id="run-2"))
    orphaned_pod(cluster, replace(REQUEST, name="job-9", step_key="other"))
    start(launcher)
    assert set(cluster.pods) == {"job-8", "job-9"}


def test_pods_of_the_requests_name_that_another_made_are_left_alone(
    launcher: JobLauncher, cluster: FakeCluster
) -> None:
    body = pod_body("job-0")
    del body["metadata"]["labels"][MANAGED_BY_LABEL]
    cluster.pods["job-0"] = [body]
    start(launcher)
    assert set(cluster.pods) == {"job-0"}


def test_removal_takes_pods_whose_job_vanished(launcher: JobLauncher, cluster: FakeCluster) -> None:
    orphaned_pod(cluster, replace(REQUEST, name="job-9"))
    remove(launcher)
    assert cluster.pods == {}


def test_retries_for_a_taken_name_are_limited(launcher: JobLauncher, cluster: FakeCluster) -> None:
    """As a quota that is being updated answers each time."""

    def conflict(call: str) -> None:
        if call == "create":
            raise api_error(409, "Operation cannot be fulfilled on resourcequotas")

    cluster.failing = conflict
    with pytest.raises(ResourceStuckError, match="its name was taken each time"):
        start(launcher)


@pytest.mark.parametrize("call", ["list pods", "delete pod"])
def test_refused_pods_do_not_keep_the_job(launcher: JobLauncher, cluster: FakeCluster, call: str) -> None:
    start(launcher)
    cluster.pods["job-0"] = [pod_body("job-0")]

    def refuse(made: str) -> None:
        if made == call:
            raise api_error(403, "pods is forbidden")

    cluster.failing = refuse
    with pytest.raises(ApiRefusedError, match="forbidden"):
        remove(launcher)
    assert cluster.jobs == {}
