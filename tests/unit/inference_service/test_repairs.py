"""Redeployments: a failed deployment removes only what it created itself."""

import copy
from dataclasses import replace
from typing import Any

import pytest

from resources.errors import DeployError
from resources.inference_service.kserve.client import InferenceServiceClient
from resources.kubernetes.errors import ApiRefusedError
from tests.unit.inference_service import fake_kserve as fake
from tests.unit.inference_service import test_deployer
from tests.unit.inference_service.fake_kserve import FakeKServe
from tests.unit.inference_service.test_deployer import A, B, build, deployer, digests_of_pods, failure, last_failure
from tests.unit.pytorch_job.fake_cluster import api_error

UNSCHEDULABLE = {"type": "PodScheduled", "status": "False", "message": "Insufficient cpu"}
KIND_IS_MISSING = api_error(404, "the server could not find the requested resource")


@pytest.fixture
def cluster() -> FakeKServe:
    return FakeKServe()


@pytest.fixture
def serving_a(cluster: FakeKServe) -> FakeKServe:
    deployer(cluster).deploy(A)
    return cluster


@pytest.fixture
def half_of_a(cluster: FakeKServe, monkeypatch: pytest.MonkeyPatch) -> FakeKServe:
    """Two replicas are requested. Both were ready; now the second one fits on no node."""
    monkeypatch.setattr(test_deployer, "SETTINGS", test_deployer.SETTINGS.model_copy(update={"min_replicas": 2}))
    second = fake.pod_body("second", {})

    def add() -> None:
        assert cluster.service is not None
        second["metadata"]["annotations"] = cluster.service["metadata"]["annotations"]
        second["metadata"]["labels"]["template"] = fake.template_of(cluster.service)
        cluster.pods.append(second)
        cluster.make_ready(second)

    cluster.clock.after(10, add)
    deployer(cluster).deploy(A)
    second["status"] = {"phase": "Pending", "conditions": [UNSCHEDULABLE]}
    return cluster


def interrupt_after(cluster: FakeKServe, seconds: float, error: type[BaseException] = KeyboardInterrupt) -> None:
    def interrupt() -> None:
        raise error

    cluster.clock.after(seconds, interrupt)


def fail_on(cluster: FakeKServe, *calls: str, error: Exception, after: float = 0.0) -> None:
    begin = cluster.clock.now + after

    def fail(call: str) -> None:
        if call in calls and cluster.clock.now >= begin:
            raise error

    cluster.failing = fail


def edit(cluster: FakeKServe, **fields: Any) -> None:
    """As `kubectl edit` does: the spec changes, the annotations stay, and the pods are recreated."""
    assert cluster.service is not None
    body = copy.deepcopy(cluster.service)
    body["spec"]["predictor"] |= fields
    cluster._store(body)


def test_model_in_service_survives_a_replica_that_fits_nowhere(half_of_a: FakeKServe) -> None:
    error = failure(half_of_a, A)
    assert "(unschedulable) second: Insufficient cpu" in str(error)
    assert "existed before this deployment and was left unchanged" in str(error)
    assert error.transient
    assert half_of_a.deleted == []
    assert digests_of_pods(half_of_a) == [A.model_digest, A.model_digest]
    assert half_of_a.served_model().model_digest == A.model_digest


@pytest.mark.parametrize("error", [KeyboardInterrupt, TimeoutError])
def test_interrupted_repair_deletes_nothing(half_of_a: FakeKServe, error: type[BaseException]) -> None:
    interrupt_after(half_of_a, 5, error)
    with pytest.raises(error):
        deployer(half_of_a).deploy(A)
    assert half_of_a.deleted == []


@pytest.mark.parametrize("calls", [("get",), ("list pods",), ("get", "list pods", "replace", "delete", "events")])
def test_kserve_removed_during_a_repair_deletes_nothing(half_of_a: FakeKServe, calls: tuple[str, ...]) -> None:
    fail_on(half_of_a, *calls, error=KIND_IS_MISSING, after=3)
    with pytest.raises(ApiRefusedError, match="install KServe"):
        deployer(half_of_a).deploy(A)
    assert half_of_a.deleted == []


def test_first_deployment_of_another_process_is_not_deleted_by_a_retry(cluster: FakeKServe) -> None:
    cluster.behaviors[A.model_digest] = fake.ends(2)
    InferenceServiceClient(cluster, cluster).create(build(A))
    cluster.clock.sleep(2)
    assert "was left unchanged" in str(failure(cluster, A))
    assert cluster.deleted == []


def test_create_answered_twice_is_still_undone(cluster: FakeKServe) -> None:
    def lose_once() -> None:
        cluster.after_write = lambda: None
        raise api_error(504, "gateway timeout")

    cluster.after_write = lose_once
    cluster.behaviors[A.model_digest] = fake.ends(2)
    assert "so the InferenceService was deleted" in str(failure(cluster, A))
    assert len(cluster.writes) == 1
    assert cluster.service is None


def test_service_in_deletion_is_replaced_and_only_the_new_one_is_undone(serving_a: FakeKServe) -> None:
    assert serving_a.service is not None
    serving_a.service["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    serving_a.clock.after(5, lambda: (setattr(serving_a, "service", None), serving_a.pods.clear()))
    serving_a.behaviors[B.model_digest] = fake.ends(2)
    assert "so the InferenceService was deleted" in str(failure(serving_a, B))
    assert [body["metadata"]["uid"] for body in serving_a.deleted] == ["uid-2"]


def test_service_whose_deletion_does_not_end_is_left_alone(serving_a: FakeKServe) -> None:
    assert serving_a.service is not None
    serving_a.service["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    error = failure(serving_a, B)
    assert "it is being deleted" in str(error)
    assert error.transient
    assert (len(serving_a.writes), serving_a.deleted) == (1, [])


def test_service_that_someone_else_created_meanwhile_is_left_alone(cluster: FakeKServe) -> None:
    cluster.behaviors[A.model_digest] = fake.never_ready

    def recreate() -> None:
        cluster.service = None
        cluster.pods.clear()
        InferenceServiceClient(cluster, cluster).create(build(A))

    cluster.clock.after(60, recreate)
    assert "deleted or changed by someone else" in str(failure(cluster, A))
    assert cluster.service is not None
    assert cluster.deleted == []


def test_service_created_between_the_first_look_and_the_write_is_left_alone(cluster: FakeKServe) -> None:
    third = replace(B, model_digest="c" * 64)

    def create(call: str) -> None:
        if call == "create":
            cluster.failing = lambda call: None
            InferenceServiceClient(cluster, cluster).create(build(third))

    cluster.failing = create
    assert "was changed by someone else at the same time" in str(failure(cluster, A))
    assert cluster.service is not None
    assert cluster.service["metadata"]["annotations"]["cifar/model-digest"] == third.model_digest


@pytest.mark.parametrize("deleted", [True, False])
def test_change_by_someone_else_before_the_clean_up_is_left_alone(serving_a: FakeKServe, deleted: bool) -> None:
    third = build(replace(B, model_digest="c" * 64))
    serving_a.behaviors[B.model_digest] = fake.ends(2)

    def change(call: str) -> None:
        if call == "log" and serving_a.service is not None:  # read after the deployment failed
            serving_a.failing = lambda call: None
            if deleted:
                serving_a.service = None
            else:
                serving_a.service["metadata"]["annotations"] = third["metadata"]["annotations"]

    serving_a.failing = change
    error = failure(serving_a, B)
    assert "ended with exit code 2" in str(error)
    assert "deleted or changed by someone else meanwhile and was left unchanged" in str(error)
    assert (serving_a.service is None) == deleted
    assert len(serving_a.writes) == 2


def test_deletion_leaves_a_service_that_took_the_name_alone(serving_a: FakeKServe) -> None:
    def take() -> None:
        serving_a.service = None
        InferenceServiceClient(serving_a, serving_a).create(build(B))

    serving_a.clock.after(3, take)
    assert deployer(serving_a).delete()
    assert serving_a.service is not None
    assert len(serving_a.deleted) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"minReplicas": 3},
        {"containers": [{"name": "kserve-container", "image": "other"}]},
        {"nodeSelector": {"a": "b"}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_manually_edited_spec_is_restored(serving_a: FakeKServe, fields: dict[str, Any]) -> None:
    assert serving_a.service is not None
    before = copy.deepcopy(serving_a.service["spec"])
    edit(serving_a, **fields)
    outcome = deployer(serving_a).deploy(A)
    assert outcome.changed
    assert serving_a.service["spec"] == before
    (pod,) = serving_a.pods
    assert pod["metadata"]["labels"]["template"] == fake.template_of(serving_a.service)
    assert deployer(serving_a).deploy(A).changed is False


def test_status_written_during_the_comparison_is_no_edit(serving_a: FakeKServe) -> None:
    def write_status(call: str) -> None:
        if call == "dry run":
            assert serving_a.service is not None
            serving_a.service["metadata"]["resourceVersion"] = "99"
            serving_a.failing = lambda call: None

    serving_a.failing = write_status
    assert not deployer(serving_a).deploy(A).changed
    assert len(serving_a.writes) == 1


def test_part_added_to_the_spec_by_hand_is_removed(serving_a: FakeKServe) -> None:
    assert serving_a.service is not None
    serving_a.service["spec"]["transformer"] = {"containers": [{"name": "kserve-container", "image": "other"}]}
    assert deployer(serving_a).deploy(A).changed
    assert list(serving_a.service["spec"]) == ["predictor"]


def test_edited_spec_that_serves_is_put_back_when_its_repair_fails(serving_a: FakeKServe) -> None:
    edit(serving_a, containers=[{"name": "kserve-container", "image": "hotfix"}])
    serving_a.clock.sleep(30)
    edited = copy.deepcopy(serving_a.service)
    serving_a.behaviors[A.model_digest] = fake.waits("ErrImagePull", "no such tag")
    assert f"rolled back to model {A.model_digest} version 1, which is served as before" in str(failure(serving_a, A))
    assert edited is not None
    assert serving_a.service is not None
    assert serving_a.service["spec"] == edited["spec"]
    assert len(serving_a.pods) == 1


def test_spec_edited_during_a_deployment_is_reported_and_left(serving_a: FakeKServe) -> None:
    serving_a.behaviors[B.model_digest] = fake.never_ready
    serving_a.clock.after(5, lambda: edit(serving_a, nodeSelector={"no-such": "node"}))
    begin = serving_a.clock.now
    assert "changed by someone else" in str(failure(serving_a, B))
    assert serving_a.clock.now - begin < 10
    assert serving_a.service is not None
    assert serving_a.service["spec"]["predictor"]["nodeSelector"] == {"no-such": "node"}


def test_manually_removed_labels_do_not_break_the_rollback(serving_a: FakeKServe) -> None:
    assert serving_a.service is not None
    del serving_a.service["metadata"]["labels"]
    serving_a.behaviors[B.model_digest] = fake.ends(2)
    assert f"rolled back to model {A.model_digest}" in str(failure(serving_a, B))


def test_rollback_restores_the_service_of_orphaned_pods(serving_a: FakeKServe) -> None:
    """As `kubectl delete --cascade=orphan` leaves them."""
    serving_a.service = None
    serving_a.behaviors[B.model_digest] = fake.ends(2)
    assert f"rolled back to model {A.model_digest}" in str(failure(serving_a, B))
    assert digests_of_pods(serving_a) == [A.model_digest]
    assert serving_a.deleted == []


def test_events_that_cannot_be_read_or_written_do_not_change_the_outcome(serving_a: FakeKServe) -> None:
    fail_on(serving_a, "events", "event", "log", error=api_error(500, "etcdserver: leader changed"))
    assert last_failure(serving_a) is None
    assert deployer(serving_a).deploy(B).changed
    serving_a.behaviors[A.model_digest] = fake.ends(2)
    assert "ended with exit code 2" in str(failure(serving_a, A))


def test_api_that_breaks_after_the_model_served_does_not_change_the_outcome(serving_a: FakeKServe) -> None:
    def fail_after_success() -> Any:
        served = original()
        if served.model_digest == B.model_digest and digests_of_pods(serving_a) == [B.model_digest]:
            serving_a.failing = lambda call: (_ for _ in ()).throw(api_error(500))
        return served

    original = serving_a.served_model
    serving_a.served_model = fail_after_success
    outcome = deployer(serving_a).deploy(B)
    assert (outcome.changed, outcome.service.model_digest) == (True, B.model_digest)


def test_clean_up_that_is_refused_is_added_to_the_first_error(serving_a: FakeKServe) -> None:
    serving_a.behaviors[B.model_digest] = fake.ends(2)
    written = len(serving_a.writes)

    def refuse(call: str) -> None:
        if call == "replace" and len(serving_a.writes) > written:
            raise api_error(403, "dagster may not update inferenceservices")

    serving_a.failing = refuse
    error = failure(serving_a, B)
    assert "ended with exit code 2" in str(error)
    assert "may not update" in str(error)


def test_pods_that_cannot_be_listed_at_the_end_do_not_hide_the_timeout(serving_a: FakeKServe) -> None:
    serving_a.behaviors[B.model_digest] = fake.never_ready
    begin = serving_a.clock.now

    def fail(call: str) -> None:
        if call == "list pods" and serving_a.clock.now - begin > 19:
            raise api_error(500)

    serving_a.failing = fail
    assert "was not serving within 20 s" in str(failure(serving_a, B, start_timeout_seconds=20))


def test_pod_that_flaps_between_two_causes_is_given_up(serving_a: FakeKServe) -> None:
    def flap(cluster: FakeKServe, pod: dict[str, Any]) -> None:
        reasons = ["ErrImagePull", "ContainerCreating"]
        for n in range(200):
            act = fake.waits(reasons[n % 2], "again")
            cluster.clock.after(2 * n, lambda act=act: act(cluster, pod))

    serving_a.behaviors[B.model_digest] = flap
    begin = serving_a.clock.now
    assert "(image not pulled)" in str(failure(serving_a, B))
    assert serving_a.clock.now - begin < 150


def test_refusal_at_the_write_is_not_followed_by_a_clean_up(half_of_a: FakeKServe) -> None:
    fail_on(half_of_a, "replace", error=api_error(403, "denied"))
    with pytest.raises(ApiRefusedError, match="denied"):
        deployer(half_of_a).deploy(B)
    assert half_of_a.deleted == []


@pytest.mark.parametrize("status", [503, 403])
def test_put_back_tolerates_an_outage(serving_a: FakeKServe, status: int) -> None:
    serving_a.behaviors[B.model_digest] = fake.ends(2)

    def away(call: str) -> None:
        if call == "log":
            begin.append(serving_a.clock.now)
        if begin and serving_a.clock.now - begin[0] < 40:
            raise api_error(status)

    begin: list[float] = []
    serving_a.failing = away
    error = failure(serving_a, B)
    assert isinstance(error, DeployError)
    assert f"rolled back to model {A.model_digest} version 1, which is served as before" in str(error)
