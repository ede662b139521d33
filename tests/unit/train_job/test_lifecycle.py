"""What only TrainJobs do. tests/unit/pytorch_job runs for both kinds."""

import logging
import time
from pathlib import Path

import dagster as dg
import pytest

from resources.kubernetes.collector import CollectorTarget
from resources.kubernetes.diagnosis import WatchLimits
from resources.kubernetes.errors import ResourceStuckError
from resources.kubernetes.launch import JobLauncher, JobRequest
from resources.kubernetes.naming import MANAGED_BY_LABEL, RUN_ID_LABEL
from resources.kubernetes.watch import JobWatcher
from resources.object_store import FolderStore
from resources.train_job import TrainJob, TrainJobClient, build_train_job_collector
from tests.unit.pytorch_job.fake_cluster import RUNNING, FakeCluster, container_status, pod_body

REQUEST = JobRequest(
    TrainJob, name="job", namespace="space", step_key="step", run_id="run", ancestor_run_ids=(), work="digest"
)
MANIFEST = {
    "metadata": {"name": "job", "namespace": "space", "labels": REQUEST.labels, "annotations": REQUEST.annotations}
}


@pytest.fixture
def launcher(client: TrainJobClient, cluster: FakeCluster) -> JobLauncher[TrainJob]:
    return JobLauncher(client, clock=cluster.clock, sleeper=cluster.clock.sleep, logger=logging.getLogger("test"))


def test_failed_job_is_replaced_only_after_its_jobset_is_gone(
    launcher: JobLauncher[TrainJob], cluster: FakeCluster
) -> None:
    """Trainer derives the status of a TrainJob from the JobSet of its name, whoever owns it."""
    launcher.start(REQUEST, MANIFEST)
    cluster.condition("job", "Failed")
    seen: list[bool] = []
    cluster.before_create = lambda: seen.append("job" in cluster.jobsets)
    assert not launcher.start(REQUEST, MANIFEST).adopted
    assert seen == [False]


@pytest.mark.parametrize("ours", [True, False])
def test_jobset_whose_trainjob_vanished_is_deleted_if_it_is_ours(
    launcher: JobLauncher[TrainJob], cluster: FakeCluster, ours: bool
) -> None:
    """`kubectl delete trainjob --cascade=orphan` leaves one."""
    labels = {MANAGED_BY_LABEL: TrainJob.managed_by() if ours else "someone"}
    cluster.jobsets["job"] = {"metadata": {"name": "job", "namespace": "space", "uid": "set", "labels": labels}}
    if ours:
        launcher.start(REQUEST, MANIFEST)
        assert cluster.num_created == 1
    else:
        with pytest.raises(ResourceStuckError, match="JobSet space/job"):
            launcher.start(REQUEST, MANIFEST)
        assert set(cluster.jobsets) == {"job"}


def test_first_node_may_end_long_before_the_others(client: TrainJobClient, cluster: FakeCluster) -> None:
    job = client.create(MANIFEST)
    assert job
    other = pod_body("job", "node-1", container_statuses=[container_status(RUNNING)])
    cluster.pods["job"] = [pod_body("job", "node-0", phase="Succeeded"), other]
    cluster.condition("job", "Running")
    cluster.clock.after(5000, lambda: cluster.condition("job", "Succeeded"))
    watcher = JobWatcher(
        client,
        job,
        limits=WatchLimits(start_timeout_seconds=100),
        clock=cluster.clock,
        sleeper=cluster.clock.sleep,
        logger=logging.getLogger("test"),
    )
    assert watcher.wait_until_finished().finished


def test_nodes_are_named_by_their_index(client: TrainJobClient, cluster: FakeCluster) -> None:
    cluster.pods["job"] = [pod_body("job", f"node-{index}") for index in (10, 2, 0)]
    assert [pod.replica for pod in client.pods("space", "job")] == ["node-0", "node-2", "node-10"]


def test_events_of_the_child_job_are_reported(client: TrainJobClient, cluster: FakeCluster) -> None:
    job = client.create(MANIFEST)
    assert job
    cluster.events["job-node-0"] = ["FailedCreate: exceeded quota"]
    assert client.events(job, []) == ["FailedCreate: exceeded quota"]


@pytest.mark.parametrize(("hours", "left"), [(23, {"job"}), (25, set())])
def test_finished_job_is_collected_a_day_after_its_run(
    client: TrainJobClient,
    cluster: FakeCluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hours: int,
    left: set[str],
) -> None:
    """Trainer deletes no finished job."""
    sensor = build_train_job_collector(lambda context: CollectorTarget(client, "space", FolderStore(tmp_path)))

    @dg.job
    def training() -> None: ...

    with dg.DagsterInstance.ephemeral() as instance:
        run = instance.create_run_for_job(training, status=dg.DagsterRunStatus.STARTED)
        instance.report_run_failed(run)
        labels = {RUN_ID_LABEL: run.run_id, MANAGED_BY_LABEL: TrainJob.managed_by()}
        client.create({"metadata": {"name": "job", "namespace": "space", "labels": labels}})
        cluster.condition("job", "Failed")
        now = time.time()
        monkeypatch.setattr("resources.kubernetes.collector.time.time", lambda: now + hours * 3600)
        sensor(dg.build_sensor_context(instance=instance))
    assert set(cluster.jobs) == left
