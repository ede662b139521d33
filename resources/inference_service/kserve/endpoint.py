"""Where a service answers, seen from where this process runs, and what it says there.

Outside of the cluster that is a port of this machine which leads to a Service. `kubectl port-forward svc/...` stays
with one pod, which an update ends; here each connection goes to a pod that is ready when it begins.
"""

import contextlib
import random
import socket
import threading
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from kubernetes import client as k8s
from kubernetes.stream import portforward

from resources.inference_service.client import InferenceClient, ServedModel, ServerError
from resources.inference_service.kserve.client import InferenceService
from resources.inference_service.kserve.manifest import predictor_name
from resources.kubernetes.pods import read_pod

_ASK_SECONDS = 10.0
_WAKE_SECONDS = 60.0
"""A serverless revision without pods takes this long at most to get one."""
_CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class ServiceEndpoint:
    """Finds a service's address in one of three ways.

    With `base_url`: through an ingress or whatever else leads there. In a pod: by the cluster's own DNS. Else: through
    a port that this process forwards, to the service's pods or, for a serverless one, to Knative's gateway.
    """

    configuration: k8s.Configuration
    in_cluster: bool
    gateway: str
    base_url: str | None = None
    host: str | None = None

    def client(self, service: InferenceService, *, canary: bool = False) -> InferenceClient:
        """A client that asks it as its users do; with `canary`, its newest revision alone."""
        name = predictor_name(service.name)
        host = f"{'latest-' if canary else ''}{name}.{service.namespace}.svc"
        headers: dict[str, str] = {}
        if self.base_url:
            url = self.base_url.rstrip("/")
            headers["Host"] = self.host or urlsplit(service.status.get("url") or "").netloc or host
        elif self.in_cluster:
            url = f"http://{host}"
        elif service.serverless:
            namespace, _, gateway = self.gateway.partition("/")
            url = _forwarded_url(self.configuration, namespace, gateway)
            headers["Host"] = f"{host}.cluster.local"
        else:
            url = _forwarded_url(self.configuration, service.namespace, name)
        return InferenceClient(url, timeout=_WAKE_SECONDS if service.serverless else _ASK_SECONDS, headers=headers)

    def served_model(self, service: InferenceService, *, canary: bool = False) -> ServedModel:
        """What answers its users; with `canary`, what its newest revision answers. ServerError where nothing does."""
        client = self.client(service, canary=canary)
        try:
            return client.served_model()
        except ServerError as error:
            problem = next((each.problem for each in list(_ports.values()) if each.url == client.base_url), None)
            if problem:
                raise ServerError(f"{error} A port could not be forwarded: {problem}") from error
            raise


class _ForwardedPort:
    """Listens on loopback as long as this process lives."""

    def __init__(self, configuration: k8s.Configuration, namespace: str, service: str):
        self._configuration = configuration
        self._namespace = namespace
        self._service = service
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.problem: str | None = None
        """Why the last connection was not carried; None when it was."""
        threading.Thread(target=self._accept, name=f"port to {namespace}/{service}", daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._carry, args=(connection,), daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        """Bytes of one connection, both ways. One that cannot be carried ends without an answer; `problem` says why."""
        with near:
            try:
                far, forward = self._connect()
            except Exception as error:
                self.problem = str(error).strip()[:300]
                return
            self.problem = None
            back = threading.Thread(target=_pump, args=(far, near), daemon=True)
            back.start()
            _pump(near, far)
            back.join()
            with contextlib.suppress(OSError):
                forward.close()

    def _connect(self) -> tuple[Any, Any]:
        """A socket that leads to a ready pod behind the Service, and what it belongs to."""
        # A client of its own: the stream functions change the one they use while they do.
        core: Any = k8s.CoreV1Api(k8s.ApiClient(self._configuration))
        timeout = {"_request_timeout": _CONNECT_SECONDS}
        service = core.read_namespaced_service(self._service, self._namespace, **timeout)
        selector = ",".join(f"{key}={value}" for key, value in service.spec.selector.items())
        found = core.list_namespaced_pod(self._namespace, label_selector=selector, **timeout).items
        ready = [pod.metadata.name for pod in found if read_pod(pod, pod.metadata.name).ready]
        if not ready:
            raise LookupError(f"no pod is ready behind Service {self._namespace}/{self._service}")
        port = next(port.target_port for port in service.spec.ports if port.port == 80)
        if not isinstance(port, int):
            raise LookupError(f"Service {self._namespace}/{self._service} names its target port {port}, not a number")
        forward = portforward(
            core.connect_get_namespaced_pod_portforward,
            random.choice(ready),
            self._namespace,
            ports=str(port),
            **timeout,
        )
        far = forward.socket(port)
        far.setblocking(True)
        return far, forward


_ports: dict[tuple[str, str, str], _ForwardedPort] = {}
_ports_lock = threading.Lock()


def _forwarded_url(configuration: k8s.Configuration, namespace: str, service: str) -> str:
    """Address of this process's one port that leads there."""
    key = (configuration.host, namespace, service)
    with _ports_lock:
        if key not in _ports:
            _ports[key] = _ForwardedPort(configuration, namespace, service)
        return _ports[key].url


def _pump(source: Any, sink: Any) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
