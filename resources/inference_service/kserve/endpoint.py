"""Where a service answers, seen from where this process runs.

Outside of the cluster that is a port of this machine which leads to a Service. `kubectl port-forward svc/...` stays
with one pod, which an update ends; here each connection goes to a pod that is ready when it begins.
"""

import contextlib
import random
import socket
import socketserver
import threading
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from kubernetes import client as k8s
from kubernetes.stream import portforward

from resources.inference_service.client import InferenceClient
from resources.inference_service.kserve.client import InferenceService
from resources.inference_service.kserve.manifest import predictor_name
from resources.kubernetes.pods import read_pod

_ASK_SECONDS = 10.0
_WAKE_SECONDS = 60.0
"""A serverless revision without pods takes this long at most to get one."""
_TIMEOUT = {"_request_timeout": 10.0}


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
            url = _forwarded_url(self.configuration, *self.gateway.split("/"))
            headers["Host"] = f"{host}.cluster.local"
        else:
            url = _forwarded_url(self.configuration, service.namespace, name)
        return InferenceClient(url, timeout=_WAKE_SECONDS if service.serverless else _ASK_SECONDS, headers=headers)


class _Forwarder(socketserver.ThreadingTCPServer):
    """Listens on loopback as long as this process lives. What cannot be carried to a pod is answered with 502."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, configuration: k8s.Configuration, namespace: str, service: str):
        super().__init__(("127.0.0.1", 0), socketserver.BaseRequestHandler)
        self._configuration = configuration
        self._namespace = namespace
        self._service = service
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, name=f"port to {namespace}/{service}", daemon=True).start()

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Carry the bytes of one connection, both ways."""
        try:
            far, forward = self._connect()
        except Exception as error:
            text = f"A port could not be forwarded: {str(error).strip()[:300]}".encode()
            request.recv(1 << 16)
            request.sendall(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: %d\r\n\r\n%b" % (len(text), text))
            return
        back = threading.Thread(target=_pump, args=(far, request), daemon=True)
        back.start()
        _pump(request, far)
        back.join()
        with contextlib.suppress(OSError):
            forward.close()

    def _connect(self) -> tuple[Any, Any]:
        """A socket that leads to a ready pod behind the Service, and what it belongs to."""
        # A client of its own: the stream functions change the one they use while they do.
        core: Any = k8s.CoreV1Api(k8s.ApiClient(self._configuration))
        service = core.read_namespaced_service(self._service, self._namespace, **_TIMEOUT)
        selector = ",".join(f"{key}={value}" for key, value in service.spec.selector.items())
        found = core.list_namespaced_pod(self._namespace, label_selector=selector, **_TIMEOUT).items
        ready = [pod.metadata.name for pod in found if read_pod(pod, pod.metadata.name).ready]
        if not ready:
            raise LookupError(f"no pod is ready behind Service {self._namespace}/{self._service}")
        port = str(next(port.target_port for port in service.spec.ports if port.port == 80))
        call = core.connect_get_namespaced_pod_portforward
        forward = portforward(call, random.choice(ready), self._namespace, ports=port, **_TIMEOUT)
        far = forward.socket(int(port))
        far.setblocking(True)
        return far, forward


_forwarders: dict[tuple[str, str, str], _Forwarder] = {}
_lock = threading.Lock()


def _forwarded_url(configuration: k8s.Configuration, namespace: str, service: str) -> str:
    """Address of this process's one port that leads there."""
    key = (configuration.host, namespace, service)
    with _lock:
        if key not in _forwarders:
            _forwarders[key] = _Forwarder(configuration, namespace, service)
        return _forwarders[key].url


def _pump(source: Any, sink: Any) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
