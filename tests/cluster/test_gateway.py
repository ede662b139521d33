"""KServeInferenceService behind a Gateway: canaries in Standard mode on a real cluster with Envoy Gateway."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import urllib3
import yaml
from kubernetes import client as k8s
from prometheus_client.parser import text_string_to_metric_families

from resources.errors import DeployError
from resources.inference_service.client import InferenceClient, ServerError
from tests.cluster.conftest import Minio
from tests.cluster.kubectl import PATIENCE, forwarded, kubectl, wait_for
from tests.cluster.serving_story import (
    NAME,
    Models,
    asking,
    grant_access,
    left_behind,
    promote_and_withdraw,
    service,
    store_models,
)
from tests.fixtures.ports import free_port

HOST = "cifar10.example"
PROXIES = "envoy-gateway-system"


@pytest.fixture(scope="module")
def models(namespace: str, minio: Minio, core: Any) -> Models:
    names: Any = k8s.ApisApi(core.api_client).get_api_versions()
    groups = {group.name for group in names.groups}
    if not {"serving.kserve.io", "gateway.envoyproxy.io"} <= groups:
        pytest.skip("the cluster has no Envoy Gateway beside KServe")
    grant_access(namespace)
    return store_models(minio.store())


@dataclass(frozen=True)
class Gateway:
    """A Gateway in the namespace, with addresses inside and outside of the cluster."""

    name: str
    inside: str
    outside: str


@pytest.fixture
def gateway(namespace: str, models: Models) -> Iterator[Gateway]:
    """Removed afterwards together with what was deployed."""
    spec = {"gatewayClassName": "eg", "listeners": [{"name": "http", "protocol": "HTTP", "port": 8080}]}
    body = {"apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway", "metadata": {"name": "web"}, "spec": spec}
    kubectl("-n", namespace, "apply", "-f", "-", text=yaml.safe_dump(body))
    kubectl("-n", namespace, "wait", "--for=condition=Programmed", "gateway/web", PATIENCE)
    labels = f"gateway.envoyproxy.io/owning-gateway-namespace={namespace}"
    (proxy,) = kubectl("-n", PROXIES, "get", "services", "-l", labels, "-o", "name").split()
    port = free_port()
    try:
        with forwarded(PROXIES, proxy, port, 8080):
            inside = f"http://{proxy.removeprefix('service/')}.{PROXIES}.svc:8080"
            yield Gateway(f"{namespace}/web", inside, f"http://127.0.0.1:{port}")
    finally:
        kubectl("-n", namespace, "delete", "inferenceservices,gateways", "--all", "--wait=true", PATIENCE)
        wait_for("removal of the service", lambda: not left_behind(namespace))


def routes(namespace: str) -> list[Any]:
    return json.loads(kubectl("-n", namespace, "get", "httproutes", "-o", "json"))["items"]


@pytest.mark.thorough
def test_canary_is_promoted_or_withdrawn_without_a_failed_request(
    namespace: str, minio: Minio, models: Models, gateway: Gateway
) -> None:
    serving = service(namespace, gateway=gateway.name, host=HOST, canary_percent=20)
    serving.deploy(models.first)
    users = InferenceClient(gateway.outside, headers={"Host": HOST})
    wait_for("the route", lambda: answers(users))
    with asking(namespace, gateway.inside, HOST) as tally:
        promote_and_withdraw(serving, models, minio.store(), users, tally.wait_until_answered_by)

    assert tally.failures == []
    assert set(tally.answers) == {each.model_digest for each in (models.first, models.second, models.boastful)}
    assert not [name for name in left_behind(namespace) if "canary" in name]
    (route,) = routes(namespace)
    (backend,) = route["spec"]["rules"][0]["backendRefs"]
    assert (backend["name"], backend["weight"]) == (f"{NAME}-predictor", 100)

    assert serving.delete()
    wait_for("deletion of the route with its service", lambda: not routes(namespace))


@pytest.mark.thorough
def test_a_shadow_gets_copies_of_the_requests_and_answers_no_client(
    namespace: str, models: Models, gateway: Gateway
) -> None:
    serving = service(namespace, gateway=gateway.name, host=HOST, shadow_seconds=10)
    serving.deploy(models.first)
    wait_for("the route", lambda: answers(InferenceClient(gateway.outside, headers={"Host": HOST})))
    copies: list[float] = []

    def find_fault(shadow: InferenceClient) -> str | None:
        copies.append(num_predicted(shadow))
        return "this story rejects it"

    with asking(namespace, gateway.inside, HOST) as tally:
        with pytest.raises(DeployError, match="this story rejects it"):
            serving.deploy(replace(models.second, find_fault=find_fault))
        (route,) = routes(namespace)

    assert copies[0] >= 50, "the client sends about 20 a second for 10 seconds"
    assert tally.failures == []
    assert set(tally.answers) == {models.first.model_digest}
    assert "filters" not in route["spec"]["rules"][0]


def num_predicted(client: InferenceClient) -> float:
    """Images that a server has classified since it started."""
    with urllib3.PoolManager(timeout=client.timeout) as pool:
        text = pool.request("GET", f"{client.base_url}/metrics", headers=client.headers).data.decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return next(sample.value for sample in samples if sample.name == "cifar10_batch_images_sum")


def answers(client: InferenceClient) -> bool:
    try:
        return client.served_model().ready
    except ServerError:
        return False
