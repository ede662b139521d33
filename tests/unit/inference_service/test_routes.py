"""Canaries in Standard mode: the weights of both services over time, and what is left afterwards."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from pydantic import ValidationError

from resources.errors import DeployError
from resources.inference_service import DeployRequest
from resources.inference_service.kserve import resource as module
from resources.inference_service.kserve.config import InferenceServiceSettings
from resources.inference_service.kserve.deployer import Outcome
from resources.inference_service.kserve.resource import KServeInferenceService
from resources.inference_service.kserve.traffic import HTTPRoute
from resources.kubernetes.errors import ApiRefusedError, SettingsError
from tests.unit.inference_service import fake_kserve as fake
from tests.unit.inference_service.fake_gateway import CANARY, FakeGateway
from tests.unit.inference_service.test_deployer import view_of
from tests.unit.inference_service.test_serverless import A, B, Judge

C = DeployRequest("s3://models/c/", "c" * 64, "3", "run-c")
MAIN_ONLY = {"cifar10-predictor": 100}
SHADOWED = {"cifar10-predictor": 100, f"{CANARY}-predictor": 0}
SPLIT = {"cifar10-predictor": 80, f"{CANARY}-predictor": 20}


def serving(**fields: Any) -> KServeInferenceService:
    settings = InferenceServiceSettings(image="server:1", canary_percent=fields.pop("percent", 20))
    values = {"settings": settings, "namespace": "space", "gateway": "gateways/web", "host": "cifar10.example"}
    return KServeInferenceService(**{**values, **fields})


def deploy(
    cluster: FakeGateway, request: DeployRequest, judge: Callable[[Any], str | None] | None = None, **fields: Any
) -> Outcome:
    deployer = serving(**fields)._deployer(view_of(cluster))  # pyright: ignore[reportArgumentType]
    return deployer.deploy(replace(request, find_fault=judge or Judge()))


def served(cluster: FakeGateway) -> str:
    return cluster.main.served_model().model_digest


@pytest.fixture
def serving_a() -> FakeGateway:
    cluster = FakeGateway()
    deploy(cluster, A)
    return cluster


def test_first_model_gets_all_requests_and_is_not_judged() -> None:
    cluster, judge = FakeGateway(), Judge("would be refused")
    assert deploy(cluster, A, judge).changed
    assert judge.asked == []
    assert cluster.weights == [MAIN_ONLY]
    assert cluster.candidate.writes == []
    assert cluster.route is not None
    assert cluster.route["spec"]["parentRefs"] == [{"namespace": "gateways", "name": "web"}]
    assert cluster.route["spec"]["hostnames"] == ["cifar10.example"]


def test_host_of_the_route_is_the_name_in_the_host_header() -> None:
    cluster = FakeGateway()
    deploy(cluster, A, host="CIFAR10.example:8443")
    assert cluster.route is not None
    assert cluster.route["spec"]["hostnames"] == ["cifar10.example"]


@pytest.mark.parametrize(
    "host", ["[::1]:80", "::1", "10.0.0.1", "10.0.0.1:80", "a_b.example", "a.example:", "*.a.example"]
)
def test_host_that_no_route_can_have_is_refused(host: str) -> None:
    with pytest.raises(ValidationError, match="is not a DNS name such as"):
        serving(host=host)
    assert serving(host=host, gateway=None, percent=None).host == host


def test_canary_that_answers_well_is_promoted_and_removed(serving_a: FakeGateway) -> None:
    judge = Judge()
    outcome = deploy(serving_a, B, judge)
    assert (outcome.changed, outcome.previous_digest) == (True, A.model_digest)
    assert [digest for digest, _ in judge.asked] == [B.model_digest]
    assert serving_a.weights == [MAIN_ONLY, SPLIT, MAIN_ONLY]
    assert served(serving_a) == B.model_digest
    assert (serving_a.candidate.service, serving_a.candidate.pods) == (None, [])


def test_candidate_is_the_same_service_under_another_name_and_belongs_to_the_first(serving_a: FakeGateway) -> None:
    deploy(serving_a, B)
    (candidate,), promoted = serving_a.candidate.writes, serving_a.main.writes[-1]
    assert candidate["spec"] == promoted["spec"]
    assert "canaryTrafficPercent" not in candidate["spec"]["predictor"]
    (owner,) = candidate["metadata"]["ownerReferences"]
    assert (owner["name"], owner["uid"]) == ("cifar10", promoted["metadata"]["uid"])


@pytest.mark.parametrize("fault", ["0.1 of 256 right", DeployError("gone", transient=True)])
def test_refused_canary_leaves_the_service_as_it_was(serving_a: FakeGateway, fault: str | DeployError) -> None:
    with pytest.raises(DeployError) as caught:
        deploy(serving_a, B, Judge(fault))
    assert "it was rejected with 20 % of the requests" in str(caught.value)
    assert "existed before this deployment and was left unchanged" in str(caught.value)
    assert caught.value.transient is isinstance(fault, DeployError)
    assert serving_a.weights == [MAIN_ONLY, SPLIT, MAIN_ONLY]
    assert len(serving_a.main.writes) == 1
    assert serving_a.candidate.service is None


def test_canary_that_does_not_start_gets_no_request_and_is_explained(serving_a: FakeGateway) -> None:
    serving_a.candidate.behaviors[B.model_digest] = fake.ends(2, log="Not serving: wrong digest")
    with pytest.raises(DeployError, match="Not serving: wrong digest"):
        deploy(serving_a, B)
    assert serving_a.weights == [MAIN_ONLY]
    assert serving_a.candidate.service is None
    assert served(serving_a) == A.model_digest


def test_model_that_fails_when_it_is_promoted_loses_all_requests(serving_a: FakeGateway) -> None:
    serving_a.main.behaviors[B.model_digest] = fake.fits_nowhere("Insufficient cpu")
    with pytest.raises(DeployError, match=f"rolled back to model {A.model_digest}"):
        deploy(serving_a, B)
    assert serving_a.weights[-1] == MAIN_ONLY
    assert serving_a.candidate.service is None
    assert served(serving_a) == A.model_digest


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, TimeoutError])
def test_interrupted_canary_is_removed(serving_a: FakeGateway, interrupt: type[BaseException]) -> None:
    with pytest.raises(interrupt):
        deploy(serving_a, B, Judge(interrupt()))
    assert serving_a.weights[-1] == MAIN_ONLY
    assert serving_a.candidate.service is None
    assert len(serving_a.main.writes) == 1


def test_canary_of_a_run_that_was_cut_off_is_replaced(serving_a: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module.RouteSplit, "end", lambda self, wait: None)
        with pytest.raises(DeployError):
            deploy(serving_a, B, Judge("stands for a killed worker"))
    assert serving_a.weights[-1] == SPLIT
    judge = Judge()
    deploy(serving_a, C, judge)
    assert [digest for digest, _ in judge.asked] == [C.model_digest]
    assert serving_a.weights == [MAIN_ONLY, SPLIT, MAIN_ONLY, SPLIT, MAIN_ONLY]
    assert served(serving_a) == C.model_digest
    assert serving_a.candidate.service is None


@pytest.mark.parametrize(("later", "percent"), [(A, 20), (A, None), (C, 20), (C, None)])
@pytest.mark.parametrize("when", ["starting", "judged", "refused"])
def test_later_deployment_takes_over_from_a_canary(
    serving_a: FakeGateway, when: str, later: DeployRequest, percent: int | None
) -> None:
    def take_over() -> None:
        serving_a.candidate.after_write = lambda: None
        deploy(serving_a, later, percent=percent)

    def judge(_: Any) -> str | None:
        take_over()
        return "few right" if when == "refused" else None

    if when == "starting":
        serving_a.candidate.after_write = take_over
    with pytest.raises(DeployError) as caught:
        deploy(serving_a, B, judge)
    assert ("was deleted or changed by someone else" if when == "starting" else "later deployment") in str(caught.value)
    assert not caught.value.transient
    assert served(serving_a) == later.model_digest
    assert serving_a.weights[-1] == MAIN_ONLY
    assert serving_a.candidate.service is None


@pytest.mark.parametrize("is_answering", [True, False])
def test_deployment_without_a_canary_leaves_that_of_a_later_one(
    serving_a: FakeGateway, monkeypatch: pytest.MonkeyPatch, is_answering: bool
) -> None:
    def start_another() -> None:
        serving_a.main.after_write = lambda: None
        with monkeypatch.context() as patch:
            patch.setattr(module.RouteSplit, "end", lambda self, wait: None)
            with pytest.raises(DeployError):
                deploy(serving_a, B, Judge("stands for a canary that is still being judged"))

    if not is_answering:
        serving_a.main.pods.clear()
    serving_a.main.after_write = start_another
    deploy(serving_a, C, percent=None)
    assert served(serving_a) == C.model_digest
    assert serving_a.weights[-1] == SPLIT
    assert serving_a.candidate.served_model().model_digest == B.model_digest


def test_canary_left_after_a_promotion_is_removed_by_the_next_deployment(
    serving_a: FakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module.RouteSplit, "end", lambda self, wait: None)
        deploy(serving_a, B)
    assert (serving_a.weights[-1], served(serving_a)) == (SPLIT, B.model_digest)
    assert not deploy(serving_a, B).changed
    assert serving_a.weights[-1] == MAIN_ONLY
    assert serving_a.candidate.service is None


def test_deploying_the_same_model_changes_nothing(serving_a: FakeGateway) -> None:
    judge = Judge("would be refused")
    assert not deploy(serving_a, A, judge).changed
    assert judge.asked == []
    assert serving_a.weights == [MAIN_ONLY]
    assert len(serving_a.main.writes) == 1


def test_without_a_canary_the_route_always_names_the_service(serving_a: FakeGateway) -> None:
    deploy(serving_a, B, percent=None)
    assert serving_a.weights == [MAIN_ONLY]
    assert served(serving_a) == B.model_digest


def test_without_a_gateway_nothing_is_routed() -> None:
    cluster = FakeGateway()
    cluster.is_installed = False
    deploy(cluster, A, percent=None, gateway=None)
    deploy(cluster, B, percent=None, gateway=None)
    assert (cluster.route, cluster.candidate.writes) == (None, [])


@pytest.mark.parametrize("percent", [None, 20])
def test_shadow_gets_a_copy_of_the_requests_before_any_of_them(serving_a: FakeGateway, percent: int | None) -> None:
    judge, began = Judge(), serving_a.clock.now
    deploy(serving_a, B, judge, percent=percent, shadow_seconds=300)
    assert [digest for digest, _ in judge.asked] == [B.model_digest]
    assert serving_a.clock.now - began > 300
    assert serving_a.weights == [MAIN_ONLY, SHADOWED, *([SPLIT] if percent else []), MAIN_ONLY]
    assert served(serving_a) == B.model_digest
    assert serving_a.candidate.service is None


def test_rejected_shadow_is_removed(serving_a: FakeGateway) -> None:
    with pytest.raises(DeployError, match="it was rejected with a copy of the requests: few right"):
        deploy(serving_a, B, Judge("few right"), percent=None, shadow_seconds=300)
    assert serving_a.weights == [MAIN_ONLY, SHADOWED, MAIN_ONLY]
    assert serving_a.candidate.service is None


@pytest.mark.parametrize("shadow_seconds", [300, 15])
def test_server_that_fails_under_copied_requests_is_not_promoted(serving_a: FakeGateway, shadow_seconds: int) -> None:
    def runs_out_of_memory(cluster: fake.FakeKServe, pod: dict[str, Any]) -> None:
        fake.gets_ready(cluster, pod)
        state = {"terminated": {"exit_code": 137, "reason": "OOMKilled", "finished_at": "2026-01-01T00:00:30Z"}}
        ended = {**fake.container({"running": {}}, restarts=1), "last_state": state}
        cluster.clock.after(30, lambda: pod["status"].update({"container_statuses": [ended]}))

    serving_a.candidate.behaviors[B.model_digest] = runs_out_of_memory
    if shadow_seconds == 15:
        assert deploy(serving_a, B, shadow_seconds=shadow_seconds).changed, "it fails later than that"
        return
    judge = Judge()
    with pytest.raises(DeployError, match="out of memory"):
        deploy(serving_a, B, judge, shadow_seconds=shadow_seconds)
    assert judge.asked == []
    assert serving_a.weights == [MAIN_ONLY, SHADOWED, MAIN_ONLY]
    assert served(serving_a) == A.model_digest


def test_shadow_needs_a_gateway() -> None:
    with pytest.raises(ValidationError, match="shadow_seconds needs a gateway and mode Standard"):
        serving(gateway=None, percent=None, shadow_seconds=10)


def test_what_cannot_be_routed_is_refused_before_anything_is_written() -> None:
    cluster = FakeGateway()
    with pytest.raises(DeployError, match="There is no Gateway gateways/other"):
        deploy(cluster, A, gateway="gateways/other")
    cluster.is_installed = False
    with pytest.raises(ApiRefusedError, match="no Gateway kind: install an implementation of the Gateway API"):
        deploy(cluster, A)
    assert cluster.main.writes == []


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("route", "was not made by this project.* If KServe made it, set disableIngressCreation"),
        ("candidate", "was not made by this project"),
        ("service", "is not a canary"),
    ],
)
def test_objects_of_others_are_left_alone(serving_a: FakeGateway, kind: str, message: str) -> None:
    assert serving_a.route is not None
    assert serving_a.main.service is not None
    ours = serving_a.main.service["metadata"]
    metadata: dict[str, Any] = {"name": CANARY, "namespace": "space"}
    if kind == "route":
        serving_a.route["metadata"]["labels"] = ours["labels"]  # as KServe copies them
    elif kind == "candidate":
        serving_a.candidate.service = {"metadata": metadata, "spec": {"predictor": {}}}
    else:
        serving_a.candidate.service = {**serving_a.main.service, "metadata": {**ours, **metadata}}
    before = serving_a.candidate.service
    with pytest.raises(DeployError, match=message):
        deploy(serving_a, B)
    assert serving_a.candidate.service is before
    assert (len(serving_a.main.writes), serving_a.weights) == (1, [MAIN_ONLY])


REFUSAL = ("NotAllowedByListeners", "No listener admits namespace space")


@pytest.mark.parametrize("percent", [None, 20])
def test_refusal_by_the_gateway_is_named_and_comes_before_the_update(
    serving_a: FakeGateway, percent: int | None
) -> None:
    serving_a.refusal = REFUSAL
    with pytest.raises(DeployError, match=": ".join(REFUSAL)):
        deploy(serving_a, B, percent=percent)
    assert serving_a.candidate.writes == []
    assert len(serving_a.main.writes) == 1
    assert served(serving_a) == A.model_digest


def test_first_service_that_the_gateway_refuses_is_removed() -> None:
    cluster = FakeGateway()
    cluster.refusal = REFUSAL
    with pytest.raises(DeployError, match=f"(?s){': '.join(REFUSAL)}.*the InferenceService was deleted"):
        deploy(cluster, A)
    assert (cluster.main.service, cluster.main.pods) == (None, [])


def test_error_of_a_canary_that_cannot_be_withdrawn_does_not_blame_the_service(serving_a: FakeGateway) -> None:
    def judge(_: Any) -> str:
        serving_a.refusal = REFUSAL
        return "few right"

    with pytest.raises(DeployError) as caught:
        deploy(serving_a, B, judge)
    assert "The canary was not withdrawn: " in str(caught.value)
    assert "existed before this deployment and was left unchanged" in str(caught.value)
    assert "could not be restored" not in str(caught.value)


def test_interrupt_withdraws_the_canary_although_others_write_the_route(serving_a: FakeGateway) -> None:
    def judge(_: Any) -> str:
        serving_a.num_conflicts = 2
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        deploy(serving_a, B, judge)
    assert serving_a.weights[-1] == MAIN_ONLY
    assert serving_a.candidate.service is None


@pytest.mark.parametrize(
    ("conditions", "missing"),
    [
        ([{"type": "Accepted", "status": "True", "observedGeneration": 1}], None),
        ([{"type": "Accepted", "status": "False", "observedGeneration": 1, "reason": "No"}], "No"),
        ([], "no controller has accepted"),
        (None, "no controller has accepted"),
    ],
)
def test_only_the_entry_of_the_routes_own_gateway_counts(
    conditions: list[dict[str, Any]] | None, missing: str | None
) -> None:
    accepted = {"type": "Accepted", "status": str(missing is not None), "observedGeneration": 1, "reason": "Other"}
    own = {"parentRef": {"namespace": "gateways", "name": "web"}, "conditions": conditions}
    other = {"parentRef": {"namespace": "elsewhere", "name": "web"}, "conditions": [accepted]}
    metadata = {"name": "cifar10", "namespace": "space", "generation": 1}
    spec = {"parentRefs": [own["parentRef"]]}
    found = HTTPRoute({"metadata": metadata, "spec": spec, "status": {"parents": [other, own]}}).find_missing()
    assert (found is None) == (missing is None)
    assert (missing or "") in (found or "")


def test_canary_in_standard_mode_needs_a_gateway() -> None:
    with pytest.raises(ValidationError, match="canary_percent needs a gateway or mode Knative"):
        serving(gateway=None)
    with pytest.raises(ValidationError, match="gateway"):
        serving(gateway="web")
    assert serving(gateway=None, percent=None)


def test_name_of_the_canary_has_to_be_short_enough_too() -> None:
    with pytest.raises((ValidationError, SettingsError), match="c-canary' is too long"):
        serving(name="c" * 39)
    assert serving(name="c" * 39, gateway=None, percent=None)


def test_models_are_judged_without_the_route_and_used_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeGateway()
    found = serving(base_url="http://gateway.example/")
    view = view_of(cluster)  # pyright: ignore[reportArgumentType]
    service = deploy(cluster, A).service
    public = found._for_users(view, service)
    assert (public.base_url, public.headers) == ("http://gateway.example", {"Host": "cifar10.example"})
    direct = partial(found._asking, module.k8s.Configuration(), True)(service, False)
    assert (direct.base_url, direct.headers) == ("http://cifar10-predictor.space.svc", {})
