"""The committed NetworkPolicies, evaluated as the API defines them, open exactly what docs/kubernetes.md lists.

tests/cluster/test_network.py tests them on a real network.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.fixtures.connections import ALL_WAYS, NAMED_PORTS, NAMESPACES, OPEN, PODS, PORTS, Pod, Way, table

ROOT = Path(__file__).parents[3]
K8S = ROOT / "k8s"
NAMESPACE_OF_FOLDER = {"platform": "cifar-platform"}
"""What the kustomizations set where the files name no namespace; the others set `cifar`."""
COMMITTED_LABELS = {
    "platform/minio.yaml": "minio",
    "platform/mlflow.yaml": "mlflow",
    "platform/store.yaml": "store-setup",
    "dagster/webserver.yaml": "webserver",
    "dagster/daemon.yaml": "daemon",
    "dagster/code.yaml": "code",
    "dagster/postgres.yaml": "postgresql",
    "monitoring/exporter.yaml": "exporter",
}


def committed() -> Iterator[dict[str, Any]]:
    for path in sorted(K8S.rglob("*network.yaml")):
        if path.parent.name.startswith("external-"):  # not for the servers in the table
            continue
        for policy in yaml.safe_load_all(path.read_text()):
            policy["metadata"].setdefault("namespace", NAMESPACE_OF_FOLDER.get(path.parent.name, "cifar"))
            yield policy


POLICIES = list(committed())


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    for expression in selector.get("matchExpressions", []):
        key, operator = expression["key"], expression["operator"]
        assert operator in ("In", "Exists"), f"not evaluated here: {operator}"
        if key not in labels or (operator == "In" and labels[key] not in expression["values"]):
            return False
    return selector.get("matchLabels", {}).items() <= labels.items()


def is_peer(peer: Mapping[str, Any], pod: Pod, own_namespace: str) -> bool:
    if "namespaceSelector" in peer:
        labels = {**NAMESPACES[pod.namespace], "kubernetes.io/metadata.name": pod.namespace}
        if not selects(peer["namespaceSelector"], labels):
            return False
    elif pod.namespace != own_namespace:
        return False
    return selects(peer.get("podSelector", {}), pod.labels)


def is_port(port: Mapping[str, Any], way: Way) -> bool:
    number, protocol = PORTS[way.port]
    if isinstance(port["port"], str):  # the name of a port of the target
        return NAMED_PORTS[port["port"]] == way.target == way.port
    return (port["port"], port.get("protocol", "TCP")) == (number, protocol)


def is_admitted(way: Way, direction: str) -> bool:
    """Whether the policies at one end admit the connection: none selects the pod, or a rule names the other end."""
    source, target = PODS[way.source], PODS[way.target]
    (pod, other, key) = (source, target, "to") if direction == "Egress" else (target, source, "from")
    specs = [
        policy["spec"]
        for policy in POLICIES
        if policy["metadata"]["namespace"] == pod.namespace
        and direction in policy["spec"]["policyTypes"]
        and selects(policy["spec"]["podSelector"], pod.labels)
    ]
    rules = [rule for spec in specs for rule in spec.get(direction.lower(), [])]
    return not specs or any(
        any(is_peer(peer, other, pod.namespace) for peer in rule[key]) if key in rule else True
        for rule in rules
        if "ports" not in rule or any(is_port(port, way) for port in rule["ports"])
    )


def test_policies_open_what_is_documented_and_nothing_else() -> None:
    found = {way for way in ALL_WAYS if is_admitted(way, "Egress") and is_admitted(way, "Ingress")}
    assert sorted(found - OPEN) == [], "open, but not documented"
    assert sorted(OPEN - found) == [], "documented, but shut"


def test_the_page_has_the_table_of_connections() -> None:
    assert table() in (ROOT / "docs/kubernetes.md").read_text(), f"docs/kubernetes.md should have:\n{table()}"


@pytest.mark.parametrize(("file", "kind"), COMMITTED_LABELS.items())
def test_the_evaluated_pods_have_the_committed_labels(file: str, kind: str) -> None:
    documents = [document for document in yaml.safe_load_all((K8S / file).read_text()) if document]
    templates = [document["spec"]["template"] for document in documents if "template" in document.get("spec", {})]
    assert [template["metadata"]["labels"] for template in templates] == [PODS[kind].labels]


@pytest.mark.parametrize("namespace", ["cifar-platform", "cifar"])
def test_namespace_denies_ingress_and_egress(namespace: str) -> None:
    (deny,) = [
        policy["spec"]
        for policy in POLICIES
        if (policy["metadata"]["namespace"], policy["metadata"]["name"]) == (namespace, "deny-all")
    ]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy["metadata"]["name"])
def test_no_policy_allows_traffic_to_or_from_everyone(policy: dict[str, Any]) -> None:
    spec = policy["spec"]
    for rule in spec.get("ingress", []):
        assert rule.get("from"), "open to everyone"
        for peer in rule["from"]:
            assert peer.get("podSelector") or peer["namespaceSelector"] != {}
    for rule in spec.get("egress", []):
        if not rule.get("to"):  # DNS and the cluster's API are not selected by labels
            assert {port["port"] for port in rule["ports"]} in ({53}, {443, 6443, 8443})
