"""The thin client: absence and conflict are values, everything else is an error that names the object."""

from collections.abc import Callable
from typing import Any

import pytest
import urllib3.exceptions

from resources.kubernetes.errors import ApiRefusedError, ApiUnavailableError, SettingsError
from resources.kubernetes.job import Job, JobClient
from tests.unit.pytorch_job.fake_cluster import KINDS, FakeCluster, api_error, container_status, pod_body, terminated

MANIFEST = {"metadata": {"name": "job", "namespace": "space", "labels": {"a": "1"}}}


@pytest.fixture
def job(client: JobClient[Any]) -> Job:
    created = client.create(MANIFEST)
    assert created
    return created


def test_absence_and_conflict_are_values(client: JobClient[Any], job: Job) -> None:
    assert client.create(MANIFEST) is None
    assert client.get("space", "other") is None
    assert client.get("space", "job") == job
    client.delete(job)
    client.delete(job)
    assert client.get("space", "job") is None
    assert client.patch(job, {"metadata": {"labels": {"a": "2"}}}) is None


def test_deletes_exactly_the_job_it_was_given(client: JobClient[Any], job: Job) -> None:
    client.delete(job)
    again = client.create(MANIFEST)
    client.delete(job)
    assert client.get("space", "job") == again


def test_finds_by_labels_oldest_first(client: JobClient[Any], cluster: FakeCluster, job: Job) -> None:
    cluster.clock.sleep(1)
    client.create({"metadata": {"name": "another", "namespace": "space", "labels": {"a": "1"}}})
    client.create({"metadata": {"name": "unlabelled", "namespace": "space"}})
    assert [found.name for found in client.find("space", "a=1")] == ["job", "another"]


@pytest.mark.parametrize(
    "error",
    [
        *(api_error(status, "later") for status in (401, 408, 429, 500, 502, 503, 504)),
        urllib3.exceptions.ProtocolError("connection broken"),
        urllib3.exceptions.ReadTimeoutError(None, "url", "timed out"),  # pyright: ignore[reportArgumentType]
        ConnectionRefusedError("refused"),
    ],
    ids=str,
)
def test_no_answer_is_not_a_refusal(client: JobClient[Any], cluster: FakeCluster, error: Exception) -> None:
    cluster.failing = raising(error)
    for call in (
        lambda: client.create(MANIFEST),
        lambda: client.get("space", "job"),
        lambda: client.pods("space", "job"),
    ):
        with pytest.raises(ApiUnavailableError, match=r"space.*") as caught:
            call()
        assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            api_error(403, 'User "sa" cannot create resource "pytorchjobs"', kind="pytorchjobs"),
            "sa.*Role that allows it",
        ),
        (api_error(404, "the server could not find the requested resource"), "install {operator} and"),
        (api_error(404, 'namespaces "space" not found', name="space", kind="namespaces"), "Create the namespace"),
        (api_error(422, "spec is invalid", name="job"), "spec is invalid.*Correct"),
        (api_error(403, 'admission webhook "jobs" denied the request: no such runtime'), "no such runtime.*Correct"),
        (api_error(400, "admission webhook denied the request: Master.replicas must be 1"), "must be 1"),
    ],
)
def test_refusals_say_what_to_do(client: JobClient[Any], cluster: FakeCluster, error: Exception, message: str) -> None:
    cluster.failing = raising(error)
    with pytest.raises(ApiRefusedError, match=message.replace("{operator}", client.operator)) as caught:
        client.create(MANIFEST)
    assert f"create {client.resource.kind} space/job" in str(caught.value)
    assert not caught.value.transient


def test_missing_kind_is_an_error_also_when_reading(client: JobClient[Any], cluster: FakeCluster) -> None:
    cluster.failing = raising(api_error(404, "the server could not find the requested resource"))
    with pytest.raises(ApiRefusedError, match=client.operator):
        client.get("space", "job")


def test_kind_that_the_cluster_does_not_know_is_not_installed(client: JobClient[Any], cluster: FakeCluster) -> None:
    assert client.is_installed()
    cluster.installed = tuple(kind for kind in KINDS if kind is not cluster.kind)
    assert not client.is_installed()
    cluster.failing = raising(api_error(403, "forbidden"))
    with pytest.raises(ApiRefusedError):
        client.is_installed()


def test_pods_are_read_with_their_replica_and_exits(client: JobClient[Any], cluster: FakeCluster) -> None:
    cluster.pods["job"] = [
        pod_body("job", "worker-10"),
        pod_body("job", "worker-2"),
        pod_body(
            "job",
            phase="Failed",
            container_statuses=[container_status(terminated(137, "OOMKilled"), last=terminated(1))],
        ),
    ]
    master, second, tenth = client.pods("space", "job")
    assert [pod.replica for pod in (master, second, tenth)] == ["master-0", "worker-2", "worker-10"]
    assert [end.exit_code for end in master.containers[0].exits] == [137, 1]
    assert master.containers[0].exits[0].out_of_memory
    assert master.finished
    assert second.containers == ()


def test_log_is_none_before_there_is_one(client: JobClient[Any], cluster: FakeCluster) -> None:
    assert client.log("space", "job-master-0", "pytorch") is None
    cluster.logs["job-master-0"] = "2026-01-01T00:00:00Z hello\n"
    assert client.log("space", "job-master-0", "pytorch") == "2026-01-01T00:00:00Z hello\n"


def test_events_that_may_not_be_read_are_left_out(client: JobClient[Any], cluster: FakeCluster) -> None:
    cluster.events["job"] = ["FailedCreatePod: exceeded quota"]
    assert client.warnings("space", "job") == ["FailedCreatePod: exceeded quota"]
    cluster.failing = raising(api_error(403, "forbidden"))
    assert client.warnings("space", "job") == []


def test_no_cluster_configured_is_a_config_error(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(SettingsError, match="KUBECONFIG"):
        JobClient[Any].production(kubeconfig_file=str(tmp_path / "missing"))


def raising(error: Exception) -> Callable[[str], None]:
    def fail(call: str) -> None:
        raise error

    return fail
