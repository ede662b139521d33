"""The resource: settings from the environment, address, and translation of errors."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from kubernetes import client as k8s

from cifar_assets.assets.common import retrying_infrastructure_faults
from cifar_assets.deployment import serving_for
from resources.errors import ConfigError, DeployError
from resources.inference_service import DeployRequest
from resources.inference_service.client import InferenceClient, ServerError
from resources.inference_service.kserve import resource as module
from resources.inference_service.kserve.client import InferenceService, InferenceServiceClient
from resources.inference_service.kserve.resource import KServeInferenceService
from resources.inference_service.kserve.watch import ServiceView
from tests.fixtures.settings import settings_of
from tests.unit.inference_service.fake_kserve import FakeKServe
from tests.unit.pytorch_job.fake_cluster import api_error

REQUEST = DeployRequest("s3://models/a/", "a" * 64, "1")
KUBECONFIG = {
    "apiVersion": "v1",
    "kind": "Config",
    "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:9"}}],
    "users": [{"name": "u", "user": {}}],
    "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
    "current-context": "x",
}


def serving(**environment: str) -> KServeInferenceService:
    return serving_for(settings_of({"SERVER_IMAGE": "server:2", **environment}))


def test_settings_come_from_the_environment() -> None:
    found = serving(
        SERVER_NAMESPACE="elsewhere",
        SERVER_NAME="other",
        SERVER_SETTINGS='{"mode": "Knative", "canary_percent": 5}',
        SERVER_URL="http://ingress.example",
        SERVER_HOST="other.example",
        SERVER_GATEWAY="istio-system/knative-local-gateway",
    )
    assert (found.namespace, found.name, found.settings.image) == ("elsewhere", "other", "server:2")
    assert (found.settings.mode, found.settings.canary_percent) == ("Knative", 5)
    assert (found.base_url, found.host) == ("http://ingress.example", "other.example")
    assert found.gateway == "istio-system/knative-local-gateway"
    assert (serving().namespace, serving().name) == ("cifar", "cifar10")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SERVER_IMAGE": "x", "SERVER_SETTINGS": '{"cpuu": "1"}'}, "cpuu"),
        ({"SERVER_IMAGE": "x", "SERVER_NAME": "Cifar10_v2"}, "not a DNS-1035 label"),
        ({"SERVER_IMAGE": "x", "SERVER_NAME": "c" * 70}, "too long"),
        (
            {"SERVER_IMAGE": "x", "SERVER_SETTINGS": '{"canary_percent": 5}'},
            "^SERVER_SETTINGS, .*SERVER_GATEWAY, .*KServeInferenceService. canary_percent needs a gateway",
        ),
    ],
)
def test_invalid_environment_is_rejected(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        serving_for(settings_of(environment))


def service(mode: str = "Standard", **status: Any) -> InferenceService:
    metadata = {"name": "cifar10", "namespace": "space", "annotations": {"serving.kserve.io/deploymentMode": mode}}
    return InferenceService({"metadata": metadata, "spec": {"predictor": {}}, "status": status})


def client(of: InferenceService, canary: bool = False, *, in_cluster: bool = False, **fields: str) -> InferenceClient:
    found = serving().model_copy(update={"gateway": "gateways/inner" if of.serverless else None, **fields})
    return found._asking(k8s.Configuration(host="http://127.0.0.1:9"), in_cluster, of, canary)


def address(of: InferenceService, canary: bool = False, **options: Any) -> tuple[str, Mapping[str, str]]:
    found = client(of, canary, **options)
    return found.base_url, found.headers


def test_address_in_a_pod_is_the_clusters_own() -> None:
    assert address(service(), in_cluster=True) == ("http://cifar10-predictor.space.svc", {})
    serverless = address(service("Knative"), canary=True, in_cluster=True)
    assert serverless == ("http://latest-cifar10-predictor.space.svc", {})


def test_address_of_an_ingress_includes_the_host() -> None:
    found, by = service(url="http://cifar10.example"), "http://ingress.example/"
    assert address(found, base_url=by) == ("http://ingress.example", {"Host": "cifar10.example"})
    assert address(found, base_url=by, host="mine.example")[1] == {"Host": "mine.example"}


def test_address_outside_of_the_cluster_is_a_port_of_this_process() -> None:
    plain, again = address(service()), address(service())
    assert plain[0].startswith("http://127.0.0.1:")
    assert plain == again
    serverless = address(service("Knative"))
    assert serverless[0] != plain[0]
    assert serverless[1] == {"Host": "cifar10-predictor.space.svc.cluster.local"}


def test_failed_port_forward_is_explained() -> None:
    with pytest.raises(ServerError, match=r"502: A port could not be forwarded: .*Connection refused"):
        client(service()).served_model()


@pytest.fixture
def kubeconfig(tmp_path: Path) -> str:
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(KUBECONFIG))
    return str(path)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> FakeKServe:
    """A fake cluster behind the resource; waits take no time."""
    found = FakeKServe()
    monkeypatch.setattr(InferenceServiceClient, "production", lambda *_: InferenceServiceClient(found, found))
    in_no_time = partial(ServiceView, clock=found.clock, sleep=found.clock.sleep)
    monkeypatch.setattr(module, "ServiceView", in_no_time)
    monkeypatch.setattr(InferenceClient, "served_model", lambda self: found.served_model())
    return found


def test_details_of_a_deployed_service(cluster: FakeKServe, kubeconfig: str) -> None:
    found = serving().model_copy(update={"kubeconfig_file": kubeconfig}).deploy(REQUEST)
    assert (found.model_digest, found.changed) == (REQUEST.model_digest, True)
    assert found.details["inference_service"] == "cifar/cifar10"
    assert found.details["cluster_url"] == "http://cifar10-predictor.cifar.svc"
    assert found.details["to_reach_it"] == "kubectl -n cifar port-forward svc/cifar10-predictor 8080:80"


@pytest.mark.parametrize(
    ("error", "text", "retried"),
    [
        (api_error(403, "forbidden"), "docs/kubernetes.md", False),
        (api_error(404, "the server could not find the requested resource"), "install KServe and its CRDs", False),
        (api_error(503, "not ready"), "503", True),
    ],
)
def test_api_errors_become_deploy_errors(
    cluster: FakeKServe, kubeconfig: str, error: Exception, text: str, retried: bool
) -> None:
    def fail(call: str) -> None:
        raise error

    cluster.failing = fail
    resource = serving().model_copy(update={"kubeconfig_file": kubeconfig})
    with pytest.raises(DeployError, match=text) as caught:
        resource.deploy(REQUEST)
    assert caught.value.transient is retried
    with pytest.raises(dg.RetryRequested if retried else dg.Failure), retrying_infrastructure_faults():
        resource.deploy(REQUEST)
    with pytest.raises(DeployError, match="was not deleted"):
        resource.delete()
    status = resource.status()
    assert not status.ready
    assert text in (status.reason or "")


def test_status_without_a_service(cluster: FakeKServe, kubeconfig: str) -> None:
    status = serving().model_copy(update={"kubeconfig_file": kubeconfig}).status()
    assert (status.ready, status.reason) == (False, "There is no InferenceService cifar/cifar10.")


def test_no_cluster_is_an_error_that_says_so(tmp_path: Path) -> None:
    resource = serving().model_copy(update={"kubeconfig_file": str(tmp_path / "none")})
    with pytest.raises(DeployError, match="No Kubernetes cluster is configured"):
        resource.deploy(REQUEST)
    assert "No Kubernetes cluster is configured" in (resource.status().reason or "")
