"""A port of this machine that leads to a Service of the cluster, for whoever is outside of it.

`kubectl port-forward svc/...` stays with one pod, which an update ends. Here each connection goes to a pod that is
ready when it begins.
"""

import contextlib
import random
import socket
import threading
from typing import Any

from kubernetes import client as k8s
from kubernetes.stream import portforward

_CONNECT_SECONDS = 10.0
_CHUNK = 1 << 16
_PORT = 80


class ServiceTunnel:
    """Listens on loopback as long as this process lives."""

    def __init__(self, configuration: k8s.Configuration, namespace: str, service: str):
        self._configuration = configuration
        self._namespace = namespace
        self._service = service
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.problem: str | None = None
        """Why the last connection was not carried; None when it was."""
        threading.Thread(target=self._accept, name=f"tunnel to {namespace}/{service}", daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

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
        """A socket that leads to a ready pod, and what it belongs to."""
        # A client of its own: the stream functions change the one they use while they do.
        core: Any = k8s.CoreV1Api(k8s.ApiClient(self._configuration))
        pod, port = self._target(core)
        forward = portforward(
            core.connect_get_namespaced_pod_portforward,
            pod,
            self._namespace,
            ports=str(port),
            _request_timeout=_CONNECT_SECONDS,
        )
        far = forward.socket(port)
        far.setblocking(True)
        return far, forward

    def _target(self, core: Any) -> tuple[str, int]:
        """Name of a ready pod behind the Service, and its port."""
        service = core.read_namespaced_service(self._service, self._namespace, _request_timeout=_CONNECT_SECONDS)
        selector = ",".join(f"{key}={value}" for key, value in service.spec.selector.items())
        pods = core.list_namespaced_pod(
            self._namespace, label_selector=selector, _request_timeout=_CONNECT_SECONDS
        ).items
        ready = [pod for pod in pods if _is_ready(pod)]
        if not ready:
            raise LookupError(f"no pod is ready behind Service {self._namespace}/{self._service}")
        pod = random.choice(ready)
        port = next(port for port in service.spec.ports if port.port == _PORT)
        return pod.metadata.name, _number(pod, port.target_port)


def _is_ready(pod: Any) -> bool:
    conditions = pod.status.conditions or ()
    return not pod.metadata.deletion_timestamp and any(c.type == "Ready" and c.status == "True" for c in conditions)


def _number(pod: Any, target_port: int | str) -> int:
    """A target port may be the name of one of the pod's."""
    if isinstance(target_port, int):
        return target_port
    ports = [port for container in pod.spec.containers for port in container.ports or ()]
    return next(port.container_port for port in ports if port.name == target_port)


def _pump(source: Any, sink: Any) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(_CHUNK):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
