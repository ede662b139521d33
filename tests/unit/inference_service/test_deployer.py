"""Deployments: what is served afterwards, what was written, and the error."""

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from resources.errors import DeployError
from resources.inference_service import DeployRequest
from resources.inference_service.kserve.client import InferenceServiceClient
from resources.inference_service.kserve.config import InferenceServiceSettings
from resources.inference_service.kserve.deployer import Outcome, ServiceDeployer
from resources.inference_service.kserve.manifest import build_inference_service_manifest
from resources.inference_service.kserve.watch import RolloutLimits, ServiceView
from resources.kubernetes.errors import ApiRefusedError
from tests.unit.inference_service import fake_kserve as fake
from tests.unit.inference_service.fake_kserve import FakeKServe
from tests.unit.pytorch_job.fake_cluster import api_error

SETTINGS = InferenceServiceSettings(image="server:1")
LIMITS = RolloutLimits()
A = DeployRequest("s3://models/a/", "a" * 64, "1", "run-a")
B = DeployRequest("s3://models/b/", "b" * 64, "2", "run-b")


def build(request: DeployRequest) -> dict[str, Any]:
    return build_inference_service_manifest(SETTINGS, request, name="cifar10", namespace="space")


def view_of(cluster: FakeKServe, limits: RolloutLimits = LIMITS) -> ServiceView:
    client = InferenceServiceClient(cluster, cluster)
    log = logging.getLogger("test")
    return ServiceView(client, cluster.client, "space", "cifar10", limits, log, cluster.clock, cluster.clock.sleep)


def deployer(cluster: FakeKServe, limits: RolloutLimits = LIMITS) -> ServiceDeployer:
    return ServiceDeployer(view_of(cluster, limits), build)


def last_failure(cluster: FakeKServe) -> str | None:
    return InferenceServiceClient(cluster, cluster).last_failure("space", "cifar10")


@pytest.fixture
def cluster() -> FakeKServe:
    return FakeKServe()


@pytest.fixture
def serving_a(cluster: FakeKServe) -> FakeKServe:
    deployer(cluster).deploy(A)
    return cluster


def digests_of_pods(cluster: FakeKServe) -> list[str]:
    return [pod["metadata"]["annotations"]["cifar/model-digest"] for pod in cluster.pods]


def failure(cluster: FakeKServe, request: DeployRequest, **limits: Any) -> DeployError:
    with pytest.raises(DeployError) as caught:
        deployer(cluster, replace(LIMITS, **limits)).deploy(request)
    return caught.value


def test_first_deployment(cluster: FakeKServe) -> None:
    outcome = deployer(cluster).deploy(A)
    assert (outcome.changed, outcome.previous_digest) == (True, None)
    assert outcome.service.model_digest == A.model_digest
    assert [event.reason for event in cluster.events] == ["Deployed"]


def test_deploying_the_same_model_writes_nothing(serving_a: FakeKServe) -> None:
    outcome = deployer(serving_a).deploy(replace(A, dagster_run_id="another run"))
    assert outcome == Outcome(outcome.service, False, A.model_digest)
    assert len(serving_a.writes) == 1


def test_update_ends_when_no_pod_of_the_old_version_is_left(serving_a: FakeKServe) -> None:
    began = serving_a.clock.now
    outcome = deployer(serving_a).deploy(B)
    assert (outcome.changed, outcome.previous_digest) == (True, A.model_digest)
    assert digests_of_pods(serving_a) == [B.model_digest]
    assert serving_a.clock.now - began > fake.START_SECONDS + fake.GRACE_SECONDS


def test_rollback_is_deploying_the_older_one(serving_a: FakeKServe) -> None:
    deployer(serving_a).deploy(B)
    outcome = deployer(serving_a).deploy(A)
    assert (outcome.changed, outcome.previous_digest) == (True, B.model_digest)
    assert digests_of_pods(serving_a) == [A.model_digest]


def test_ready_condition_of_an_earlier_generation_does_not_count(serving_a: FakeKServe) -> None:
    serving_a.behaviors[B.model_digest] = fake.never_ready
    assert serving_a.service is not None
    assert serving_a.service["status"]["conditions"][0]["status"] == "True"
    assert "0 of 1 new pods are ready" in str(failure(serving_a, B, start_timeout_seconds=20))


def test_answer_of_the_endpoint_decides(serving_a: FakeKServe, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = serving_a.served_model()
    monkeypatch.setattr(serving_a, "served_model", lambda: stale)
    error = failure(serving_a, B, start_timeout_seconds=30)
    assert f"the endpoint serves model {A.model_digest} version 1" in str(error)


STORIES: dict[str, tuple[Callable[[FakeKServe, dict[str, Any]], None], str, bool]] = {
    "digest": (
        fake.ends(2, log="Not serving: wrong digest"),
        "Last lines of pod-2:\n    Not serving: wrong dig",
        False,
    ),
    "code 2": (fake.ends(2), "(exit code) pod-2/kserve-container ended with exit code 2\n", False),
    "code 1": (fake.ends(1, restarts=5), "ended with exit code 1, after 3 restarts", True),
    "killed": (fake.ends(137, restarts=5), "(killed) pod-2/kserve-container ended with exit code 137", True),
    "memory": (fake.ends(137, reason="OOMKilled"), "(out of memory)", False),
    "image": (fake.waits("ErrImagePull", "no such tag"), "(image not pulled) pod-2/kserve-container: ErrImage", False),
    "secret": (fake.waits("CreateContainerConfigError", 'secret "x" not found'), 'secret "x" not found', False),
    "mount": (
        fake.mounts_nothing('MountVolume.SetUp failed for volume "files-0" : configmap "cifar-ca" not found'),
        '(pod configuration) pod-2: FailedMount: MountVolume.SetUp failed for volume "files-0" : configmap "cifar-ca" '
        "not found (for 45 s)\nWhat to do: Create the Secret or ConfigMap that it names, in the service's namespace, "
        "or correct `env_secrets`, `env_config_maps` and `config_map_mounts`.",
        False,
    ),
    "late mount": (
        fake.mounts_nothing('configmap "cifar-ca" not found', 'Pulling: Pulling image "server:1"'),
        "(slow start)",
        True,
    ),
    "slow mount": (fake.mounts_nothing("timed out waiting for the condition"), "(slow start)", True),
    "room": (fake.fits_nowhere("Insufficient cpu"), "- event FailedScheduling: Insufficient cpu", True),
    "quota": (fake.gets_no_pod, "- PredictorReady: Reason: exceeded quota: pods=10", True),
    "slow": (fake.never_ready, "Last lines of pod-2:\n    waiting for the object store", True),
}


@pytest.mark.parametrize("story", STORIES)
def test_failed_update_is_explained_and_undone(serving_a: FakeKServe, story: str) -> None:
    behavior, text, transient = STORIES[story]
    serving_a.behaviors[B.model_digest] = behavior
    before = copy.deepcopy(serving_a.service)
    error = failure(serving_a, B)
    assert text in str(error)
    assert "What to do: " in str(error)
    assert f"rolled back to model {A.model_digest} version 1, which is served as before" in str(error)
    assert error.transient is transient
    assert digests_of_pods(serving_a) == [A.model_digest]
    assert serving_a.service is not None
    assert before is not None
    assert serving_a.service["spec"] == before["spec"]
    assert serving_a.service["metadata"]["annotations"] == before["metadata"]["annotations"]


def test_log_is_found_if_the_container_is_restarted_meanwhile(
    serving_a: FakeKServe, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving_a.behaviors[B.model_digest] = fake.ends(2)
    before_the_restart, after_it = api_error(400, "previous terminated container not found"), b"t Not serving: broken"
    answers: list[Any] = [before_the_restart, b"", after_it]

    def read(*_: Any, **__: Any) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(data=answer)

    monkeypatch.setattr(serving_a, "read_namespaced_pod_log", read)
    assert "Last lines of pod-2:\n    Not serving: broken" in str(failure(serving_a, B))


def test_reason_of_a_failure_is_known_until_something_else_is_deployed(serving_a: FakeKServe) -> None:
    serving_a.behaviors[B.model_digest] = fake.ends(2)
    failure(serving_a, B)
    assert "ended with exit code 2" in (last_failure(serving_a) or "")
    del serving_a.behaviors[B.model_digest]
    deployer(serving_a).deploy(B)
    assert last_failure(serving_a) is None


def test_failed_first_deployment_leaves_nothing(cluster: FakeKServe) -> None:
    cluster.behaviors[A.model_digest] = fake.ends(2)
    assert "No model was served before, so the InferenceService was deleted" in str(failure(cluster, A))
    assert (cluster.service, cluster.pods) == (None, [])
    assert "ended with exit code 2" in (last_failure(cluster) or "")


def test_service_of_someone_else_is_left_alone(cluster: FakeKServe) -> None:
    cluster.service = {"metadata": {"name": "cifar10", "namespace": "space", "uid": "x"}, "spec": {"predictor": {}}}
    assert "was not made by this project" in str(failure(cluster, A))
    with pytest.raises(DeployError, match="was not made by this project"):
        deployer(cluster).delete()
    assert cluster.writes == []
    assert cluster.service is not None


def test_canary_of_another_service_is_left_alone(serving_a: FakeKServe) -> None:
    assert serving_a.service is not None
    serving_a.service["metadata"]["ownerReferences"] = [{"kind": "InferenceService", "name": "flowers", "uid": "x"}]
    num_writes = len(serving_a.writes)
    assert "cifar10 is a canary: it belongs to InferenceService flowers" in str(failure(serving_a, B))
    assert len(serving_a.writes) == num_writes
    assert digests_of_pods(serving_a) == [A.model_digest]


def test_interrupted_attempt_is_continued(serving_a: FakeKServe) -> None:
    InferenceServiceClient(serving_a, serving_a).replace(deployer(serving_a).deploy(A).service, build(B))
    serving_a.clock.sleep(2)
    outcome = deployer(serving_a).deploy(B)
    assert (outcome.changed, outcome.previous_digest) == (True, A.model_digest)
    assert len(serving_a.writes) == 2, "what had been written already was not written again"


def test_failed_interrupted_attempt_is_rolled_back_to_the_serving_model(serving_a: FakeKServe) -> None:
    serving_a.behaviors[B.model_digest] = fake.ends(2)
    InferenceServiceClient(serving_a, serving_a).replace(deployer(serving_a).deploy(A).service, build(B))
    serving_a.clock.sleep(2)
    assert f"rolled back to model {A.model_digest}" in str(failure(serving_a, B))
    assert digests_of_pods(serving_a) == [A.model_digest]


def test_change_by_someone_else_ends_the_wait_and_stays(serving_a: FakeKServe) -> None:
    serving_a.behaviors[B.model_digest] = fake.never_ready
    third = build(replace(B, model_digest="c" * 64))

    def change() -> None:
        assert serving_a.service is not None
        serving_a.service["metadata"]["annotations"] = third["metadata"]["annotations"]

    serving_a.clock.after(5, change)
    assert "changed by someone else" in str(failure(serving_a, B))
    assert serving_a.service is not None
    assert serving_a.service["metadata"]["annotations"]["cifar/model-digest"] == "c" * 64


def test_lost_response_to_a_write_is_tolerated(cluster: FakeKServe) -> None:
    def lose_once() -> None:
        cluster.after_write = lambda: None
        raise api_error(504, "gateway timeout")

    cluster.after_write = lose_once
    assert deployer(cluster).deploy(A).changed
    assert len(cluster.writes) == 1


def away_from(cluster: FakeKServe, begin: float, seconds: float, status: int = 503) -> None:
    def refuse(call: str) -> None:
        if begin <= cluster.clock.now < begin + seconds:
            raise api_error(status, "apiserver not ready")

    cluster.failing = refuse


@pytest.mark.parametrize("status", [503, 403])
def test_outage_of_the_api_server_is_tolerated(serving_a: FakeKServe, status: int) -> None:
    away_from(serving_a, serving_a.clock.now + 3, 60, status)
    assert deployer(serving_a).deploy(B).changed


def test_long_outage_of_the_api_server_is_a_transient_error(serving_a: FakeKServe) -> None:
    away_from(serving_a, serving_a.clock.now + 3, 10_000)
    error = failure(serving_a, B)
    assert error.transient
    assert "was not serving within 600 s: Could not read" in str(error)


@pytest.mark.parametrize("status", [503, 403])
def test_error_of_the_last_poll_does_not_keep_a_broken_revision(serving_a: FakeKServe, status: int) -> None:
    serving_a.behaviors[B.model_digest] = fake.never_ready
    away_from(serving_a, serving_a.clock.now + 590, 30, status)
    error = failure(serving_a, B)
    assert "was not serving within 600 s: 0 of 1 new pods are ready." in str(error)
    assert f"rolled back to model {A.model_digest} version 1, which is served as before" in str(error)
    assert "DeployFailed" in [event.reason for event in serving_a.events]


def test_refusal_changes_nothing(serving_a: FakeKServe) -> None:
    def refuse(call: str) -> None:
        if call == "replace":
            raise api_error(403, 'admission webhook "inferenceservice.kserve-webhook-server.validator" denied: no')

    serving_a.failing = refuse
    with pytest.raises(ApiRefusedError, match="denied: no"):
        deployer(serving_a).deploy(B)
    assert digests_of_pods(serving_a) == [A.model_digest]


def test_interrupt_puts_the_earlier_version_back(serving_a: FakeKServe) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    serving_a.clock.after(3, interrupt)
    with pytest.raises(KeyboardInterrupt):
        deployer(serving_a).deploy(B)
    assert serving_a.service is not None
    assert serving_a.service["metadata"]["annotations"]["cifar/model-digest"] == A.model_digest
    serving_a.clock.sleep(30)
    assert digests_of_pods(serving_a) == [A.model_digest]


def test_interrupted_first_deployment_leaves_nothing(cluster: FakeKServe) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    cluster.clock.after(3, interrupt)
    with pytest.raises(KeyboardInterrupt):
        deployer(cluster).deploy(A)
    cluster.clock.sleep(30)
    assert (cluster.service, cluster.pods) == (None, [])


def test_deletion_waits_for_the_pods(serving_a: FakeKServe) -> None:
    assert deployer(serving_a).delete()
    assert serving_a.pods == []
    assert not deployer(serving_a).delete()


def test_deletion_that_does_not_end_is_an_error(serving_a: FakeKServe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_a, "_end", lambda pod: None)
    with pytest.raises(DeployError, match="pod pod-1"):
        deployer(serving_a).delete()


def test_evicted_pod_of_the_old_version_does_not_hold_up_the_new_one(serving_a: FakeKServe) -> None:
    evicted = fake.pod_body("evicted", build(A)["metadata"]["annotations"])
    evicted["status"] = {"phase": "Failed", "reason": "Evicted"}
    serving_a.pods.append(evicted)
    assert deployer(serving_a).deploy(B).changed
    assert evicted in serving_a.pods


def test_earlier_restarts_of_a_ready_pod_are_ignored(serving_a: FakeKServe) -> None:
    serving_a.behaviors[B.model_digest] = fake.never_ready
    (pod,) = serving_a.pods
    ended = {"terminated": {"exit_code": 137, "reason": "OOMKilled", "finished_at": "2025-01-01T00:00:00Z"}}
    pod["status"]["container_statuses"] = [{**fake.container({"running": {}}, restarts=9), "last_state": ended}]
    InferenceServiceClient(serving_a, serving_a).replace(deployer(serving_a).deploy(A).service, build(B))
    serving_a.clock.sleep(2)
    assert deployer(serving_a).deploy(A).changed


def test_every_replica_asked_for_has_to_be_ready(serving_a: FakeKServe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "tests.unit.inference_service.test_deployer.SETTINGS", SETTINGS.model_copy(update={"min_replicas": 2})
    )
    assert "1 of 2 new pods are ready" in str(failure(serving_a, B, start_timeout_seconds=30))


def test_events_and_logs_are_optional(cluster: FakeKServe) -> None:
    def refuse(call: str) -> None:
        if call in ("event", "events", "log"):
            raise api_error(403, "forbidden")

    cluster.failing = refuse
    assert deployer(cluster).deploy(A).changed
    assert last_failure(cluster) is None
    cluster.behaviors[B.model_digest] = fake.ends(2)
    assert "ended with exit code 2" in str(failure(cluster, B))
