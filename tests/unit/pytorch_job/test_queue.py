"""Jobs in a queue of Kueue wait without a time limit, report why, and continue after a preemption."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from resources.kubernetes.job_config import JobConfig
from resources.kubernetes.queue import JOB_UID_LABEL, QUEUE_LABEL, Workload
from resources.object_store import FolderStore
from tests.unit.pytorch_job.fake_cluster import RUNNING, FakeCluster, api_error, container_status, pod_body
from tests.unit.pytorch_job.test_pipes import Story, execute

NO_QUOTA = "couldn't assign flavors to pod set node: insufficient unused quota for cpu in flavor node, 40m more needed"
PREEMPTED = "Preempted to accommodate a workload (UID: x) due to prioritization in the ClusterQueue"


class QueuedStory(Story):
    """A story whose job waits in a queue until the test admits it."""

    @property
    def config(self) -> JobConfig:
        return self.kind.config(image="image:1", replicas=2, queue="small")


def workload(job: dict[str, Any], *conditions: dict[str, str]) -> dict[str, Any]:
    metadata = {"name": "workload", "namespace": "space", "labels": {JOB_UID_LABEL: job["metadata"]["uid"]}}
    return {"metadata": metadata, "status": {"conditions": list(conditions)}}


def condition(kind: str, status: str, reason: str, message: str) -> dict[str, str]:
    return {"type": kind, "status": status, "reason": reason, "message": message}


def waits(cluster: FakeCluster, name: str, reason: str = "WaitingForQuota", message: str = NO_QUOTA) -> None:
    """Kueue suspends the job, and its pods are deleted."""
    cluster.condition(name, "Suspended")
    cluster.pods.pop(name, None)
    cluster.workloads = [workload(cluster.jobs[name], condition("QuotaReserved", "False", reason, message))]


def admitted(cluster: FakeCluster, name: str) -> None:
    if name in cluster.jobs:
        reserved = condition("QuotaReserved", "True", "QuotaReserved", "Quota reserved in ClusterQueue small")
        cluster.workloads = [workload(cluster.jobs[name], reserved, condition("Admitted", "True", "Admitted", ""))]
        cluster.pods[name] = [pod_body(name, container_statuses=[container_status(RUNNING)])]
        cluster.condition(name, "Running")


def log_of(story: Story, result: dg.ExecuteInProcessResult) -> list[str]:
    return [entry.user_message for entry in story.instance.all_logs(result.run_id)]


@pytest.fixture
def story(cluster: FakeCluster, tmp_path: Path) -> Iterator[Story]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield QueuedStory(cluster, FolderStore(tmp_path), instance)


def test_queue_is_a_label_of_the_job_but_not_of_its_pods(story: Story) -> None:
    manifest = story.kind.pipes.build_manifest(story.config, name="job", namespace="space", labels={"a": "b"})
    assert manifest["metadata"]["labels"] == {"a": "b", QUEUE_LABEL: "small"}
    assert QUEUE_LABEL not in str(manifest["spec"])


def test_waiting_for_quota_uses_up_no_limit_and_reports_reason_and_duration(story: Story) -> None:
    def act(cluster: FakeCluster, name: str) -> None:
        waits(cluster, name)
        cluster.clock.after(8000, lambda: admitted(cluster, name))
        cluster.clock.after(8100, lambda: cluster.condition(name, "Succeeded"))

    story.cluster.on_created = act
    result = story.run()
    assert result.success
    assert story.cluster.num_created == 1
    metadata = result.asset_materializations_for_node("trained")[0].metadata
    assert math.isclose(float(str(metadata[f"{story.kind.key}_queue_seconds"].value)), 8000, abs_tol=5)
    assert metadata[f"{story.kind.key}_queue_reason"].value == f"WaitingForQuota: {NO_QUOTA}"
    (waiting,) = [line for line in log_of(story, result) if "waits in queue small" in line]
    assert NO_QUOTA in waiting
    assert any("is no longer suspended. It has waited for 8" in line for line in log_of(story, result))


def test_cancel_while_waiting_removes_the_job(story: Story) -> None:
    story.cluster.on_created = waits
    story.cluster.clock.after(3000, story.cancel)
    with execute(story) as result:
        run = story.instance.get_run_by_id(result.run_id)
        assert run
        assert run.status == dg.DagsterRunStatus.CANCELED
    assert (story.cluster.jobs, story.cluster.pods) == ({}, {})


def test_preempted_job_is_awaited_and_continues(story: Story) -> None:
    def act(cluster: FakeCluster, name: str) -> None:
        waits(cluster, name)
        cluster.clock.after(100, lambda: admitted(cluster, name))
        cluster.clock.after(200, lambda: waits(cluster, name, "WaitingForPreemptedWorkloads", PREEMPTED))
        cluster.clock.after(5200, lambda: admitted(cluster, name))
        cluster.clock.after(5300, lambda: cluster.condition(name, "Succeeded"))

    story.cluster.on_created = act
    story.cluster.clock.after(150, lambda: story.say(1))
    story.cluster.clock.after(5250, lambda: story.say(2))
    result = story.run()
    assert result.success
    assert story.cluster.num_created == 1
    assert story.epochs == [(1, False), (2, False)]
    metadata = result.asset_materializations_for_node("trained")[0].metadata
    assert math.isclose(float(str(metadata[f"{story.kind.key}_queue_seconds"].value)), 5100, abs_tol=9)
    assert any(PREEMPTED in line for line in log_of(story, result))


def test_unreadable_workload_costs_only_the_reason(story: Story) -> None:
    def act(cluster: FakeCluster, name: str) -> None:
        waits(cluster, name)
        cluster.clock.after(300, lambda: admitted(cluster, name))
        cluster.clock.after(400, lambda: cluster.condition(name, "Succeeded"))

    def refuse(call: str) -> None:
        if call == "list workloads":
            raise api_error(403, "workloads is forbidden")

    story.cluster.on_created = act
    story.cluster.failing = refuse
    result = story.run()
    assert result.success
    metadata = result.asset_materializations_for_node("trained")[0].metadata
    assert "workloads is forbidden" in str(metadata[f"{story.kind.key}_queue_reason"].value)


@pytest.mark.parametrize(
    ("conditions", "words"),
    [
        ([], ""),
        ([condition("QuotaReserved", "True", "QuotaReserved", ""), condition("Admitted", "True", "Admitted", "")], ""),
        ([condition("QuotaReserved", "False", "Pending", "no room")], "Pending: no room"),
        (
            [
                condition("QuotaReserved", "True", "QuotaReserved", ""),
                condition("Admitted", "False", "UnsatisfiedAdmissionChecks", "2 checks are pending"),
            ],
            "UnsatisfiedAdmissionChecks: 2 checks are pending",
        ),
    ],
)
def test_reason_is_that_of_the_first_unmet_condition(conditions: list[dict[str, str]], words: str) -> None:
    assert Workload(workload({"metadata": {"uid": "x"}}, *conditions)).waits_for == words
