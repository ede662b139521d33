"""The NetworkPolicies on a network that enforces them: only what docs/kubernetes.md names is open.

One small pod stands for each kind of pod, with its labels, and listens on every port that matters.
"""

import json
import subprocess
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.kubectl import PATIENCE, kubectl, temporary_namespace

K8S = Path(__file__).parents[2] / "k8s"
FOLDERS = ("platform", "access", "dagster", "argo", "trainjob")
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
_JOBSET = {"jobset.sigs.k8s.io/jobset-name": "job"}

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
    "first-node": ("cifar", {**_JOBSET, "batch.kubernetes.io/job-completion-index": "0"}),
    "node": ("cifar", {**_JOBSET, "batch.kubernetes.io/job-completion-index": "1"}),
    "server": ("cifar", {"serving.kserve.io/inferenceservice": "cifar10"}),
    "step": ("cifar", {"workflows.argoproj.io/workflow": "w"}),
    "unknown": ("cifar", {}),
    "application": ("applications", {}),
    "stranger": ("strangers", {}),
}
_DAGSTER = ("webserver", "daemon", "code", "run")
_REPLICAS = ("first-replica", "replica")
_NODES = ("first-node", "node")


Way = tuple[str, str, str]
"""Two kinds of pod, and the port of the second."""


def _between(one: str, other: str) -> set[Way]:
    return {way for port in PORTS for way in ((one, other, port), (other, one, port))}


OPEN: set[Way] = {
    *(
        (client, "minio", "minio")
        for client in (*_DAGSTER, *_REPLICAS, *_NODES, "server", "step", "mlflow", "store-setup")
    ),
    *((client, "mlflow", "mlflow") for client in ("code", "run", "first-replica", "first-node")),
    *((client, "postgresql", "postgresql") for client in _DAGSTER),
    *((client, "code", "code") for client in ("webserver", "daemon")),
    *((client, "server", "server") for client in ("code", "run", "application")),
    *_between(*_REPLICAS),
    *_between(*_NODES),
    *_between("application", "stranger"),  # other namespaces
}
"""Which pods reach which others, on which port."""
_OPEN_SECONDS, _SHUT_SECONDS = 30, 4
"""Timeouts for a connection that should be open, and for one that should be closed."""
_SETTLE_SECONDS = 120
"""How long a policy may take to be enforced after it was applied."""

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
    host, port, seconds = target
    try:
        socket.create_connection((host, port), timeout=seconds).close()
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
    """Pods by kind, in temporary namespaces."""

    namespaces: dict[str, str]
    addresses: dict[str, str] = field(default_factory=dict)

    def start(self, kinds: dict[str, tuple[str, dict[str, str]]]) -> None:
        pods = [_pod(kind, self.namespaces[place], labels) for kind, (place, labels) in kinds.items()]
        kubectl("create", "-f", "-", text=yaml.safe_dump_all(pods))
        for kind, (place, _) in kinds.items():
            kubectl("-n", self.namespaces[place], "wait", "--for=condition=Ready", f"pod/{kind}", PATIENCE)
            template = "-o=jsonpath={.status.podIP}"
            self.addresses[kind] = kubectl("-n", self.namespaces[place], "get", "pod", kind, template)

    def states(self, ways: Iterable[Way]) -> dict[Way, str]:
        """The state of each connection: open, closed or an error."""
        by_kind: dict[str, list[Way]] = {}
        for way in ways:
            by_kind.setdefault(way[0], []).append(way)
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(self._states_from, by_kind, by_kind.values()))
        return {way: state for states in found for way, state in states.items()}

    def settled(self, expected: dict[Way, str]) -> dict[Way, str]:
        """The states, polled while they differ from the expected ones and policies may not be enforced yet."""
        found: dict[Way, str] = {}
        deadline = time.monotonic() + _SETTLE_SECONDS
        while True:
            found |= self.states(way for way in expected if found.get(way) != expected[way])
            if found == expected or time.monotonic() > deadline:
                return found
            time.sleep(1)

    def _states_from(self, kind: str, ways: list[Way]) -> dict[Way, str]:
        where = [
            (self.addresses[target], PORTS[port], _OPEN_SECONDS if (kind, target, port) in OPEN else _SHUT_SECONDS)
            for _, target, port in ways
        ]
        namespace = self.namespaces[PODS[kind][0]]
        command = ["kubectl", "-n", namespace, "exec", "-i", kind, "--", "python", "-c", _CONNECT]
        done = subprocess.run(command, input=json.dumps(where), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return dict(zip(ways, json.loads(done.stdout), strict=True))


def _pod(kind: str, namespace: str, labels: dict[str, str]) -> dict[str, Any]:
    ports = [str(port) for port in PORTS.values()]
    container = {
        "name": "main",
        "image": IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-u", "-c", _LISTEN, *ports],
        # port names, which policies use
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
"""Ports that policies refer to by name, and the pods that have them."""


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
        probe = ("application", "stranger", "gloo")
        assert found.settled({probe: "open"}) == {probe: "open"}
        deny = {"podSelector": {}, "policyTypes": ["Ingress"]}
        policy = {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": "deny"},
            "spec": deny,
        }
        kubectl("-n", found.namespaces["strangers"], "apply", "-f", "-", text=yaml.safe_dump(policy))
        if found.settled({probe: "shut"}) != {probe: "shut"}:
            pytest.skip("the cluster's network does not enforce NetworkPolicies")
        kubectl("-n", found.namespaces["strangers"], "delete", "networkpolicy", "deny")
        kubectl("label", "namespace", found.namespaces["applications"], "cifar/asks-model=true")
        kubectl("apply", "--server-side", "-f", "-", text=policies(found.namespaces))
        yield found


def test_only_documented_connections_are_open(network: Network) -> None:
    ways = [(kind, other, port) for kind in PODS for other in PODS for port in PORTS if other != kind]
    states = network.settled({way: "open" if way in OPEN else "shut" for way in ways})
    found = {way for way, state in states.items() if state == "open"}
    assert found - OPEN == set(), "open, but not documented"
    assert OPEN - found == set(), "documented, but shut"
    assert {state for way, state in states.items() if way not in OPEN} == {"shut"}
    assert len(states) == len(PODS) * (len(PODS) - 1) * len(PORTS)


def test_only_dns_leaves_the_namespace(network: Network) -> None:
    """Port 53 is open to the cluster's DNS."""
    script = "import socket; print(socket.getaddrinfo('kubernetes.default.svc', 443)[0][4][0])"
    for kind in ("unknown", "replica", "server", "mlflow"):
        namespace = network.namespaces[PODS[kind][0]]
        assert kubectl("-n", namespace, "exec", kind, "--", "python", "-c", script).strip()
