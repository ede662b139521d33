"""k8s/overlays/gateway: what it adds to the overlay tls. tests/cluster/test_tls.py applies it."""

import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

K8S = Path(__file__).parents[3] / "k8s"
HOSTS = ["dagster.example.com", "mlflow.example.com"]
pytestmark = pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl for kustomize")
Objects = dict[tuple[str, str, str], Any]


def built(overlay: str) -> Objects:
    text = subprocess.check_output(["kubectl", "kustomize", str(K8S / "overlays" / overlay)], text=True)
    objects = [o for o in yaml.safe_load_all(text) if o["kind"] != "Namespace"]
    return {(o["metadata"]["namespace"], o["kind"], o["metadata"]["name"]): o for o in objects}


@pytest.fixture(scope="module")
def objects() -> Objects:
    return built("gateway")


def only(objects: Objects, kind: str, name: str) -> Any:
    (found,) = [o for (_, k, n), o in objects.items() if (k, n) == (kind, name)]
    return found


def test_it_changes_only_the_arguments_of_mlflow(objects: Objects) -> None:
    before = built("tls")
    changed = [key for key in before if before[key] != objects[key]]
    assert changed == [("cifar-platform", "Deployment", "mlflow")]
    old, new = (
        each["cifar-platform", "Deployment", "mlflow"]["spec"]["template"]["spec"]["containers"][0]["args"]
        for each in (before, objects)
    )
    assert new == [*old, f"--cors-allowed-origins=https://{HOSTS[1]}"]


def test_every_route_of_the_gateway_needs_a_password(objects: Objects) -> None:
    policy = only(objects, "SecurityPolicy", "cifar")
    gateway = only(objects, "Gateway", "cifar")
    assert policy["spec"]["targetRefs"] == [
        {"group": "gateway.networking.k8s.io", "kind": "Gateway", "name": gateway["metadata"]["name"]}
    ]
    assert policy["metadata"]["namespace"] == gateway["metadata"]["namespace"]
    assert policy["spec"]["basicAuth"]["users"] == {"name": "gateway-users"}
    assert [listener["protocol"] for listener in gateway["spec"]["listeners"]] == ["HTTPS"]


def test_no_run_of_dagster_may_add_or_change_a_route_of_the_gateway(objects: Objects) -> None:
    (listener,) = only(objects, "Gateway", "cifar")["spec"]["listeners"]
    assert "allowedRoutes" not in listener  # by default those of the Gateway's namespace
    assert {namespace for namespace, kind, _ in objects if kind == "HTTPRoute"} == {"cifar-platform"}


def test_routes_have_the_names_of_the_certificate_and_reach_the_services(objects: Objects) -> None:
    routes = [o for (_, kind, _), o in objects.items() if kind == "HTTPRoute"]
    assert sorted(host for route in routes for host in route["spec"]["hostnames"]) == HOSTS
    assert only(objects, "Certificate", "gateway")["spec"]["dnsNames"] == HOSTS
    dagster = {
        (o["metadata"]["name"], port["port"])
        for o in yaml.safe_load_all((K8S / "dagster/webserver.yaml").read_text())
        for port in o["spec"].get("ports", ())
    }
    mlflow = only(objects, "Service", "mlflow")
    services = {("mlflow", port["port"]) for port in mlflow["spec"]["ports"]} | dagster
    backends = {(b["name"], b["port"]) for route in routes for b in route["spec"]["rules"][0]["backendRefs"]}
    assert backends == services


def test_the_proxy_verifies_mlflow_under_a_name_that_it_accepts(objects: Objects) -> None:
    uri = only(objects, "ConfigMap", "cifar-platform")["data"]["MLFLOW_TRACKING_URI"]
    host = urlsplit(uri).hostname
    assert only(objects, "BackendTLSPolicy", "mlflow")["spec"]["validation"]["hostname"] == host
    (rule,) = only(objects, "HTTPRoute", "mlflow")["spec"]["rules"]
    assert rule["filters"] == [{"type": "URLRewrite", "urlRewrite": {"hostname": host}}]
    arguments = only(objects, "Deployment", "mlflow")["spec"]["template"]["spec"]["containers"][0]["args"]
    (hosts,) = [argument for argument in arguments if argument.startswith("--allowed-hosts=")]
    assert host in hosts.partition("=")[2].split(",")
