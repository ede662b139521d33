"""The NetworkPolicies on a network that enforces them: what docs/kubernetes.md names is open, all else is shut.

One small pod stands for each kind of pod, with its labels, and listens on every port that matters.
"""

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.kubectl import kubectl, temporary_namespace

K8S = Path(__file__).parents[2] / "k8s"
FOLDERS = ("platform", "access", "dagster", "argo")
IMAGE = "python:3.11-slim"
PORTS = {
    "minio": 9000,
    "mlflow": 5000,
    "postgresql": 5432,
    "code": 4000,
    "webserver": 3000,
    "server": 8080,
    "gloo": 45000,
}
_JOB = {"training.kubeflow.org/job-name": "job"}

_COMPONENT = "app.kubernetes.io/component"
_NAME = "app.kubernetes.io/name"
PODS: dict[str, tuple[str, dict[str, str]]] = {
    "minio": ("cifar-platform", {_NAME: "minio"}),
    "mlflow": ("cifar-platform", {_NAME: "mlflow"}),
    "store-setup": ("cifar-platform", {_NAME: "store-setup"}),
    "webserver": ("cifar", {_COMPONENT: "webserver"}),
    "daemon": ("cifar", {_COMPONENT: "daemon"}),
    "code": ("cifar", {_COMPONENT: "code"}),
    "run": ("cifar", {_COMPONENT: "run_worker"}),
    "postgresql": ("cifar", {_NAME: "dagster-postgresql"}),
    "first-replica": ("cifar", {**_JOB, "training.kubeflow.org/replica-type": "master"}),
    "replica": ("cifar", {**_JOB, "training.kubeflow.org/replica-type": "worker"}),
    "server": ("cifar", {"serving.kserve.io/inferenceservice": "cifar10"}),
    "step": ("cifar", {"workflows.argoproj.io/workflow": "w"}),
    "unknown": ("cifar", {}),
    "application": ("applications", {}),
    "stranger": ("strangers", {}),
}
_DAGSTER = ("webserver", "daemon", "code", "run")
_REPLICAS = ("first-replica", "replica")


def _between(one: str, other: str) -> set[tuple[str, str, str]]:
    return {way for port in PORTS for way in ((one, other, port), (other, one, port))}


OPEN: set[tuple[str, str, str]] = {
    *((client, "minio", "minio") for client in (*_DAGSTER, *_REPLICAS, "server", "step", "mlflow", "store-setup")),
    *((client, "mlflow", "mlflow") for client in ("code", "run", "first-replica")),
    *((client, "postgresql", "postgresql") for client in _DAGSTER),
    *((client, "code", "code") for client in ("webserver", "daemon")),
    *((client, "server", "server") for client in ("code", "run", "application")),
    *_between(*_REPLICAS),
    *_between("application", "stranger"),  # namespaces that are not ours
}
"""Who reaches whom, on which port."""

_LISTEN = """
import selectors, socket, sys
selector = selectors.DefaultSelector()
for port in map(int, sys.argv[1:]):
    selector.register(socket.create_server(("", port)), selectors.EVENT_READ)
while True:
    for key, _ in selector.select():
        key.fileobj.accept()[0].close()
"""
_CONNECT = """
import concurrent.futures, json, socket, sys
def reaches(target):
    host, port = target
    try:
        socket.create_connection((host, port), timeout=4).close()
        return "open"
    except TimeoutError:
        return "shut"
    except OSError as error:
        return f"error: {error}"
targets = json.load(sys.stdin)
with concurrent.futures.ThreadPoolExecutor(64) as pool:
    print(json.dumps(list(pool.map(reaches, targets))))
"""


@dataclass
class Network:
    """Pods by kind, in namespaces of their own."""

    namespaces: dict[str, str]
    addresses: dict[str, str] = field(default_factory=dict)

    def start(self, kinds: dict[str, tuple[str, dict[str, str]]]) -> None:
        pods = [_pod(kind, self.namespaces[place], labels) for kind, (place, labels) in kinds.items()]
        kubectl("create", "-f", "-", text=yaml.safe_dump_all(pods))
        for kind, (place, _) in kinds.items():
            kubectl("-n", self.namespaces[place], "wait", "--for=condition=Ready", f"pod/{kind}", "--timeout=180s")
            template = "-o=jsonpath={.status.podIP}"
            self.addresses[kind] = kubectl("-n", self.namespaces[place], "get", "pod", kind, template)

    def reached_from(self, kind: str, place: str, targets: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
        """What a pod finds open, shut, or in error, by kind of pod and name of port."""
        where = [(self.addresses[target], PORTS[port]) for target, port in targets]
        command = ["kubectl", "-n", self.namespaces[place], "exec", "-i", kind, "--", "python", "-c", _CONNECT]
        done = subprocess.run(command, input=json.dumps(where), capture_output=True, text=True, timeout=150)
        assert done.returncode == 0, done.stderr
        return dict(zip(targets, json.loads(done.stdout), strict=True))


def _pod(kind: str, namespace: str, labels: dict[str, str]) -> dict[str, Any]:
    ports = [str(port) for port in PORTS.values()]
    container = {
        "name": "main",
        "image": IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-u", "-c", _LISTEN, *ports],
        # names of ports, which policies use
        "ports": [{"name": name, "containerPort": PORTS[kind]} for name, port in _NAMED.items() if port == kind],
        "readinessProbe": {"tcpSocket": {"port": PORTS["gloo"]}, "periodSeconds": 1},
        "resources": {"requests": {"cpu": "5m", "memory": "16Mi"}},
    }
    spec = {"containers": [container], "terminationGracePeriodSeconds": 0, "automountServiceAccountToken": False}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": kind, "namespace": namespace, "labels": labels},
        "spec": spec,
    }


_NAMED = {"s3": "minio", "http": "mlflow", "postgresql": "postgresql", "grpc": "code"}
"""Ports that policies know by name, and whose pod has them."""


def policies(namespaces: dict[str, str]) -> str:
    """The committed policies, for these namespaces."""
    documents: list[dict[str, Any]] = []
    for folder in FOLDERS:
        found = yaml.safe_load_all(kubectl("kustomize", str(K8S / folder)))
        documents += [document for document in found if document and document["kind"] == "NetworkPolicy"]
    for document in documents:
        document["metadata"]["namespace"] = namespaces[document["metadata"]["namespace"]]
    text = yaml.safe_dump_all(documents)
    for name in ("cifar-platform", "cifar"):
        text = text.replace(
            f"kubernetes.io/metadata.name: {name}\n", f"kubernetes.io/metadata.name: {namespaces[name]}\n"
        )
    return text


@pytest.fixture(scope="module")
def network(core: Any) -> Iterator[Network]:
    with ExitStack() as stack:
        places = sorted({place for place, _ in PODS.values()})
        found = Network({place: stack.enter_context(temporary_namespace(place)) for place in places})
        found.start(PODS)
        probe = [("stranger", "gloo")]
        assert found.reached_from("application", "applications", probe) == {probe[0]: "open"}
        deny = {"podSelector": {}, "policyTypes": ["Ingress"]}
        policy = {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": "deny"},
            "spec": deny,
        }
        kubectl("-n", found.namespaces["strangers"], "apply", "-f", "-", text=yaml.safe_dump(policy))
        if found.reached_from("application", "applications", probe) != {probe[0]: "shut"}:
            pytest.skip("the cluster's network does not enforce NetworkPolicies")
        kubectl("-n", found.namespaces["strangers"], "delete", "networkpolicy", "deny")
        kubectl("label", "namespace", found.namespaces["applications"], "cifar/asks-model=true")
        kubectl("apply", "--server-side", "-f", "-", text=policies(found.namespaces))
        yield found


def test_every_documented_way_is_open_and_every_other_is_shut(network: Network) -> None:
    def reached(kind: str) -> dict[tuple[str, str, str], str]:
        targets = [(other, port) for other in PODS for port in PORTS if other != kind]
        found = network.reached_from(kind, PODS[kind][0], targets)
        return {(kind, *target): state for target, state in found.items()}

    with ThreadPoolExecutor(3) as pool:
        states = {way: state for found in pool.map(reached, PODS) for way, state in found.items()}
    found = {way for way, state in states.items() if state == "open"}
    assert found - OPEN == set(), "open, but not documented"
    assert OPEN - found == set(), "documented, but shut"
    assert {state for way, state in states.items() if way not in OPEN} == {"shut"}
    assert len(states) == len(PODS) * (len(PODS) - 1) * len(PORTS)


def test_names_are_resolved_and_nothing_else_leaves(network: Network) -> None:
    """Port 53 is open to where the cluster's DNS is."""
    script = "import socket; print(socket.getaddrinfo('kubernetes.default.svc', 443)[0][4][0])"
    for kind in ("unknown", "replica", "server", "mlflow"):
        namespace = network.namespaces[PODS[kind][0]]
        assert kubectl("-n", namespace, "exec", kind, "--", "python", "-c", script).strip()
