"""Serverless deployments: the fraction of the requests for each revision over time."""

from dataclasses import replace
from typing import Any

import pytest

from resources.errors import DeployError, StoreError
from resources.inference_service import DeployRequest
from resources.inference_service.kserve.client import InferenceServiceClient
from resources.inference_service.kserve.config import InferenceServiceSettings
from resources.inference_service.kserve.deployer import Outcome, ServiceDeployer
from resources.inference_service.kserve.manifest import build_inference_service_manifest, with_traffic
from resources.kubernetes.errors import ApiRefusedError
from tests.unit.inference_service import fake_kserve as fake
from tests.unit.inference_service.fake_kserve import FakeKnative
from tests.unit.inference_service.test_deployer import view_of
from tests.unit.inference_service.test_repairs import edit
from tests.unit.pytorch_job.fake_cluster import api_error

A = DeployRequest("s3://models/a/", "a" * 64, "1", "run-a")
B = DeployRequest("s3://models/b/", "b" * 64, "2", "run-b")
IMAGE = "server:1"


def build(request: DeployRequest, percent: int | None = 10) -> dict[str, Any]:
    settings = InferenceServiceSettings(image=IMAGE, mode="Knative", min_replicas=0, canary_percent=percent)
    return build_inference_service_manifest(settings, request, name="cifar10", namespace="space")


class Judge:
    """Returns or raises what it was given, and records the canaries it was called with."""

    def __init__(self, fault: str | BaseException | None = None):
        self.fault = fault
        self.asked: list[tuple[str | None, int | None]] = []

    def __call__(self, canary: Any) -> str | None:
        self.asked.append((canary.service.model_digest, canary.service.canary_percent))
        if isinstance(self.fault, BaseException):
            raise self.fault
        return self.fault


def deploy(
    cluster: FakeKnative, request: DeployRequest, judge: Judge | None = None, percent: int | None = 10
) -> Outcome:
    deployer = ServiceDeployer(view_of(cluster), lambda request: build(request, percent))
    return deployer.deploy(replace(request, find_fault=judge or Judge()))


def replace_with(cluster: FakeKnative, manifest: dict[str, Any]) -> None:
    """Writes the manifest like a run that is interrupted directly afterwards."""
    client = InferenceServiceClient(cluster, cluster)
    service = client.get("space", "cifar10")
    assert service is not None
    client.replace(service, manifest)
    cluster.clock.sleep(10)


@pytest.fixture
def serving_a() -> FakeKnative:
    cluster = FakeKnative()
    deploy(cluster, A)
    return cluster


def test_first_model_gets_all_requests_and_is_not_judged() -> None:
    cluster, judge = FakeKnative(), Judge("would be refused")
    assert deploy(cluster, A, judge).changed
    assert judge.asked == []
    assert cluster.shares == [{A.model_digest: 100}]


def test_model_after_a_service_that_is_being_deleted_is_the_first(serving_a: FakeKnative) -> None:
    def collect() -> None:
        serving_a.service = None
        serving_a.pods.clear()
        serving_a.ready = serving_a.rolled_out = 0

    assert serving_a.service is not None
    serving_a.service["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    serving_a.clock.after(5, collect)
    judge = Judge("would be refused")
    assert deploy(serving_a, B, judge).changed
    assert judge.asked == []
    assert serving_a.shares[-1] == {B.model_digest: 100}


def test_canary_that_answers_well_is_promoted(serving_a: FakeKnative) -> None:
    judge = Judge()
    outcome = deploy(serving_a, B, judge)
    assert outcome.previous_digest == A.model_digest
    assert judge.asked == [(B.model_digest, 10)]
    assert serving_a.shares[1:] == [{B.model_digest: 10, A.model_digest: 90}, {B.model_digest: 100}]
    assert serving_a.created == 2, "promotion makes no revision"


def test_failed_canary_loses_its_traffic(serving_a: FakeKnative) -> None:
    with pytest.raises(DeployError) as caught:
        deploy(serving_a, B, Judge("0.1 of 256 right"))
    assert "it was rejected with 10 % of the requests: 0.1 of 256 right" in str(caught.value)
    assert f"rolled back to model {A.model_digest}" in str(caught.value)
    assert not caught.value.transient
    assert max(share.get(B.model_digest, 0) for share in serving_a.shares) == 10
    assert serving_a.shares[-1] == {A.model_digest: 100}


@pytest.mark.parametrize("fault", [None, "few right"])
def test_later_deployment_takes_over_from_a_canary(serving_a: FakeKnative, fault: str | None) -> None:
    class Slow(Judge):
        def __call__(self, canary: Any) -> str | None:
            deploy(serving_a, A)
            return super().__call__(canary)

    with pytest.raises(DeployError, match="was deleted or changed by someone else"):
        deploy(serving_a, B, Slow(fault))
    assert serving_a.shares[-1] == {A.model_digest: 100}


@pytest.mark.parametrize("away", [True, False])
def test_canary_without_a_verdict_loses_its_traffic_and_may_be_retried(serving_a: FakeKnative, away: bool) -> None:
    judge = Judge(StoreError("the store does not answer", transient=away))
    with pytest.raises(DeployError, match="could not be judged: the store does not answer") as caught:
        deploy(serving_a, B, judge)
    assert caught.value.transient == away
    assert max(share.get(B.model_digest, 0) for share in serving_a.shares) == 10
    assert serving_a.shares[-1] == {A.model_digest: 100}


def test_interrupted_canary_gets_no_more_than_its_share(serving_a: FakeKnative) -> None:
    with pytest.raises(KeyboardInterrupt):
        deploy(serving_a, B, Judge(KeyboardInterrupt()))
    serving_a.clock.sleep(30)
    assert max(share.get(B.model_digest, 0) for share in serving_a.shares) == 10
    assert serving_a.shares[-1] == {A.model_digest: 100}
    assert deploy(serving_a, B).changed
    assert serving_a.shares[-1] == {B.model_digest: 100}


def test_revision_that_does_not_come_up_never_gets_a_request(serving_a: FakeKnative) -> None:
    serving_a.behaviors[B.model_digest] = fake.ends(2)
    with pytest.raises(DeployError, match="ended with exit code 2"):
        deploy(serving_a, B)
    assert all(B.model_digest not in share for share in serving_a.shares)
    assert serving_a.shares[-1] == {A.model_digest: 100}


def test_without_a_canary_the_new_model_gets_all_at_once(serving_a: FakeKnative) -> None:
    judge = Judge("would be refused")
    deploy(serving_a, B, judge, percent=None)
    assert judge.asked == []
    assert serving_a.shares == [{A.model_digest: 100}, {B.model_digest: 100}]


def test_repair_of_the_serving_model_is_not_a_canary(serving_a: FakeKnative) -> None:
    serving_a.set_ready(False)
    serving_a.clock.after(5, serving_a._route)
    judge = Judge("would be refused")
    deploy(serving_a, A, judge)
    assert judge.asked == []
    assert serving_a.shares == [{A.model_digest: 100}]


def test_edited_spec_of_the_model_that_serves_is_written_again_without_a_canary(serving_a: FakeKnative) -> None:
    edit(serving_a, nodeSelector={"a": "b"})
    serving_a.clock.sleep(30)
    judge = Judge("would be refused")
    assert deploy(serving_a, A, judge).changed
    assert judge.asked == []
    first, _, *repairs = (body["spec"] for body in serving_a.writes)
    assert repairs == [first]


def test_other_settings_for_the_model_that_serves_are_a_canary(
    serving_a: FakeKnative, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.IMAGE", "server:2")
    judge = Judge()
    deploy(serving_a, A, judge)
    assert judge.asked == [(A.model_digest, 10)]


def test_previous_model_is_the_one_that_answers_while_pods_of_an_earlier_one_stay(serving_a: FakeKnative) -> None:
    deploy(serving_a, B)
    assert [pod["metadata"]["name"] for pod in serving_a.pods] == ["pod-1", "pod-2"]
    c = DeployRequest("s3://models/c/", "c" * 64, "2", "run-c")
    assert deploy(serving_a, c).previous_digest == B.model_digest


def test_deploying_the_same_model_scaled_to_zero_writes_nothing(serving_a: FakeKnative) -> None:
    serving_a.pods.clear()
    assert not deploy(serving_a, A).changed
    assert len(serving_a.writes) == 1


def test_canary_of_a_run_that_was_cut_off_is_judged_by_the_next(serving_a: FakeKnative) -> None:
    replace_with(serving_a, build(B))
    judge = Judge()
    deploy(serving_a, B, judge)
    assert judge.asked == [(B.model_digest, 10)]
    assert serving_a.shares[-1] == {B.model_digest: 100}


def test_refused_canary_of_a_run_that_was_cut_off_gets_nothing_while_the_other_sleeps(serving_a: FakeKnative) -> None:
    replace_with(serving_a, build(B))
    serving_a.pods[:] = [pod for pod in serving_a.pods if pod["metadata"]["name"] == "pod-2"]
    with pytest.raises(DeployError, match="a canary without requests: all go to the previous revision"):
        deploy(serving_a, B, Judge("bad"))
    assert serving_a.shares[-1] == {B.model_digest: 0, A.model_digest: 100}
    assert serving_a.writes[-1]["spec"] == with_traffic(serving_a.writes[-2], 0)["spec"]
    assert serving_a.writes[-1]["metadata"]["annotations"] == serving_a.writes[-2]["metadata"]["annotations"]
    assert serving_a.deleted == []


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, TimeoutError])
def test_interrupted_retry_of_a_canary_deletes_nothing(serving_a: FakeKnative, interrupt: type[BaseException]) -> None:
    replace_with(serving_a, build(B))
    serving_a.pods[:] = [pod for pod in serving_a.pods if pod["metadata"]["name"] == "pod-2"]
    with pytest.raises(interrupt):
        deploy(serving_a, B, Judge(interrupt()))
    serving_a.clock.sleep(10)
    assert serving_a.deleted == []
    assert serving_a.shares[-1] == {B.model_digest: 0, A.model_digest: 100}


def test_refused_canary_is_not_promoted_when_the_next_model_fails(serving_a: FakeKnative) -> None:
    serving_a.pods[:] = []
    replace_with(serving_a, with_traffic(build(B), 0))
    c = DeployRequest("s3://models/c/", "c" * 64, "2", "run-c")
    serving_a.behaviors[c.model_digest] = fake.ends(2)
    with pytest.raises(DeployError, match="a canary without requests"):
        deploy(serving_a, c)
    assert serving_a.shares[-1] == {B.model_digest: 0, A.model_digest: 100}
    assert max(share.get(B.model_digest, 0) for share in serving_a.shares) == 0


def test_refused_write_leaves_the_share_of_the_one_that_serves(serving_a: FakeKnative) -> None:
    def refuse(call: str) -> None:
        if call == "replace":
            serving_a.failing = lambda call: None
            raise api_error(403, "denied")

    serving_a.failing = refuse
    with pytest.raises(ApiRefusedError, match="denied"):
        deploy(serving_a, B)
    serving_a.clock.sleep(30)
    assert len(serving_a.writes) == 1
    assert serving_a.shares == [{A.model_digest: 100}]
