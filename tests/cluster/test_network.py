"""The NetworkPolicies on a network that enforces them: every connection of tests/fixtures/connections.py that may be
opened is open, every other one times out.

One small pod stands for each kind of pod, with its labels, and listens on every port.
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
from tests.fixtures.connections import ALL_WAYS, NAMED_PORTS, NAMESPACES, OPEN, PODS, PORTS, Pod, Way

K8S = Path(__file__).parents[2] / "k8s"
FOLDERS = ("overlays/serverless", "overlays/gateway", "dagster", "argo", "trainjob", "monitoring")
"""Together they have every policy: the overlays include k8s/platform and k8s/access."""
IMAGE = "python:3.11-slim"
_OPEN_SECONDS, _SHUT_SECONDS = 30, 3
"""Timeouts for a connection that should be open, and for one that should be closed."""
_SETTLE_SECONDS = 120
"""How long a policy may take to be enforced after it was applied."""

_LISTEN = """
import selectors, socket, sys
selector = selectors.DefaultSelector()
for argument in sys.argv[1:]:
    protocol, number = argument.split("/")
    if protocol == "TCP":
        server = socket.create_server(("", int(number)), backlog=1000)
    else:
        server = socket.socket(type=socket.SOCK_DGRAM)
        server.bind(("", int(number)))
    selector.register(server, selectors.EVENT_READ, protocol)
while True:
    for key, _ in selector.select():
        if key.data == "TCP":
            key.fileobj.accept()[0].close()
        else:
            key.fileobj.sendto(*key.fileobj.recvfrom(64))
"""
_CONNECT = """
import concurrent.futures, json, socket, sys, time
def ask(address, seconds):
    with socket.socket(type=socket.SOCK_DGRAM) as client:
        client.settimeout(0.5)
        end = time.monotonic() + seconds
        while True:
            try:
                client.sendto(b"?", address)
                return client.recv(64)
            except TimeoutError:
                if time.monotonic() > end:
                    raise
def reaches(target):
    host, port, protocol, seconds = target
    try:
        if protocol == "UDP":
            ask((host, port), seconds)
        else:
            socket.create_connection((host, port), timeout=seconds).close()
        return "open"
    except TimeoutError:
        return "shut"
    except OSError as error:
        return f"error: {error}"
targets = json.load(sys.stdin)
with concurrent.futures.ThreadPoolExecutor(len(targets)) as pool:
    print(json.dumps(list(pool.map(reaches, targets))))
"""


@dataclass
class Network:
    """Pods by kind, in temporary namespaces."""

    namespaces: dict[str, str]
    addresses: dict[str, str] = field(default_factory=dict)

    def start(self) -> None:
        pods = [_renamed(_pod(kind, pod), self.namespaces) for kind, pod in PODS.items()]
        kubectl("create", "-f", "-", text=yaml.safe_dump_all(pods))
        for namespace in self.namespaces.values():
            kubectl("-n", namespace, "wait", "--for=condition=Ready", "pod", "--all", PATIENCE)
            found = json.loads(kubectl("-n", namespace, "get", "pods", "-o", "json"))["items"]
            self.addresses |= {pod["metadata"]["name"]: pod["status"]["podIP"] for pod in found}

    def states(self, ways: Iterable[Way]) -> dict[Way, str]:
        """The state of each connection: open, shut or an error."""
        by_kind: dict[str, list[Way]] = {}
        for way in ways:
            by_kind.setdefault(way.source, []).append(way)
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

    def run(self, kind: str, script: str, text: str | None = None) -> str:
        """Output of a Python script in a pod."""
        namespace = self.namespaces[PODS[kind].namespace]
        command = ["kubectl", "-n", namespace, "exec", "-i", kind, "--", "python", "-c", script]
        done = subprocess.run(command, input=text or "", capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _states_from(self, kind: str, ways: list[Way]) -> dict[Way, str]:
        where = [
            (self.addresses[way.target], *PORTS[way.port], _OPEN_SECONDS if way in OPEN else _SHUT_SECONDS)
            for way in ways
        ]
        return dict(zip(ways, json.loads(self.run(kind, _CONNECT, json.dumps(where))), strict=True))


def _pod(kind: str, pod: Pod) -> dict[str, Any]:
    container = {
        "name": "main",
        "image": IMAGE,
        "imagePullPolicy": "IfNotPresent",
        "command": ["python", "-u", "-c", _LISTEN, *(f"{port.protocol}/{port.number}" for port in PORTS.values())],
        "ports": [
            {"name": name, "containerPort": PORTS[port].number} for name, port in NAMED_PORTS.items() if port == kind
        ],
        "readinessProbe": {"tcpSocket": {"port": PORTS["gloo"].number}, "periodSeconds": 1},
        "resources": {"requests": {"cpu": "5m", "memory": "16Mi"}},
    }
    spec = {"containers": [container], "terminationGracePeriodSeconds": 0, "automountServiceAccountToken": False}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": kind, "namespace": pod.namespace, "labels": pod.labels},
        "spec": spec,
    }


def policies(namespaces: dict[str, str]) -> str:
    """The committed policies, for these namespaces."""
    documents = [
        document for folder in FOLDERS for document in yaml.safe_load_all(kubectl("kustomize", str(K8S / folder)))
    ]
    found = [document for document in documents if document["kind"] == "NetworkPolicy"]
    return yaml.safe_dump_all(_renamed(document, namespaces) for document in found)


def _renamed(value: Any, names: dict[str, str]) -> Any:
    """The value with every string that is one of the names replaced."""
    if isinstance(value, dict):
        return {key: _renamed(each, names) for key, each in value.items()}
    if isinstance(value, list):
        return [_renamed(each, names) for each in value]
    return names.get(value, value) if isinstance(value, str) else value


@pytest.fixture(scope="module")
def network(core: Any) -> Iterator[Network]:
    with ExitStack() as stack:
        found = Network({place: stack.enter_context(temporary_namespace(place)) for place in NAMESPACES})
        found.start()
        probe = Way("application", "stranger", "gloo")
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
        for place, labels in NAMESPACES.items():
            for name, value in labels.items():
                kubectl("label", "namespace", found.namespaces[place], f"{name}={value}")
        kubectl("apply", "--server-side", "-f", "-", text=policies(found.namespaces))
        yield found
        kubectl("delete", "namespace", *found.namespaces.values(), "--wait=false")  # all at once


def test_documented_connections_are_open_and_all_others_time_out(network: Network) -> None:
    states = network.settled({way: "open" if way in OPEN else "shut" for way in ALL_WAYS})
    found = {way for way, state in states.items() if state == "open"}
    assert sorted(found - OPEN) == [], "open, but not documented"
    assert sorted(OPEN - found) == [], "documented, but shut"
    assert {state for way, state in states.items() if way not in OPEN} == {"shut"}
    assert states.keys() == set(ALL_WAYS)


def test_every_pod_but_minio_resolves_names(network: Network) -> None:
    script = "import socket; print(socket.getaddrinfo('kubernetes.default.svc', 443)[0][4][0])"
    for kind in (kind for kind, pod in PODS.items() if pod.namespace.startswith("cifar") and kind != "minio"):
        assert network.run(kind, script).strip()


def test_pods_that_use_the_clusters_api_reach_it(network: Network) -> None:
    script = "import socket; socket.create_connection(('kubernetes.default.svc', 443), timeout=30); print('open')"
    for kind in ("webserver", "daemon", "code", "run", "step"):
        assert network.run(kind, script).strip() == "open"
