"""The model server as a KServe InferenceService, and access to it.

Outside the cluster it is reached through a local port forwarded to its Service. `kubectl port-forward svc/...` stays
with one pod, which an update ends; here each connection goes to a pod that is ready when the connection begins.
"""

import contextlib
import random
import re
import socket
import socketserver
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import dagster as dg
from kubernetes import client as k8s
from kubernetes.stream import portforward
from pydantic import Field, model_validator

from resources.errors import DeployError
from resources.inference_service.client import InferenceClient, ServerError
from resources.inference_service.interface import (
    DeployedService,
    DeployRequest,
    InferenceServiceResource,
    ServiceStatus,
)
from resources.inference_service.kserve.client import InferenceService, InferenceServiceClient
from resources.inference_service.kserve.config import InferenceServiceSettings
from resources.inference_service.kserve.deployer import ServiceDeployer
from resources.inference_service.kserve.manifest import (
    build_inference_service_manifest,
    check_service_name,
    predictor_name,
)
from resources.inference_service.kserve.traffic import RouteSplit
from resources.inference_service.kserve.watch import RolloutLimits, ServiceView
from resources.kubernetes.api import load_configuration
from resources.kubernetes.config import SUBDOMAIN
from resources.kubernetes.errors import KubernetesError, with_notes
from resources.kubernetes.naming import candidate_name
from resources.kubernetes.pods import read_pod

DEFAULT_NAME = "cifar10"
DEFAULT_GATEWAY = "kourier-system/kourier-internal"
_ASK_SECONDS = 10.0
_WAKE_SECONDS = 60.0
"""Maximum time for a serverless revision without pods to get one."""
_HOST = re.compile(rf"(?![0-9.]+(:|$)){SUBDOMAIN.pattern}(:[0-9]{{1,5}})?", re.IGNORECASE)
"""A DNS name that an HTTPRoute accepts, with or without a port; not an IP address."""
_TIMEOUT = {"_request_timeout": 10.0}


class KServeInferenceService(InferenceServiceResource):
    """Serves from the cluster of the pod's service account or KUBECONFIG, in Standard or serverless mode."""

    settings: InferenceServiceSettings = Field(description="Settings of the InferenceService.")
    namespace: str = Field(description="Namespace of the InferenceService.")
    name: str = Field(default=DEFAULT_NAME, description="Name of the InferenceService.")
    kubeconfig_file: str | None = Field(
        default=None, description="Kubeconfig; by default the pod's service account, else KUBECONFIG."
    )
    base_url: str | None = Field(
        default=None,
        description="Address at which Dagster reaches the service, such as an ingress. By default the cluster's DNS "
        "name in a pod, and elsewhere a port forwarded by this process.",
    )
    host: str | None = Field(
        default=None, description="Host header for base_url. By default the host of the service's URL."
    )
    gateway: str | None = Field(
        default=None,
        pattern=r"^[^/]+/[^/]+$",
        description="Standard mode: Gateway of the Gateway API as namespace/name, which routes requests to the service "
        "and to a canary. Knative mode: Knative's gateway as namespace/service, for a port forwarded by this process; "
        f"by default {DEFAULT_GATEWAY}.",
    )
    shadow_seconds: float | None = Field(
        default=None,
        gt=0,
        description="Standard mode with a gateway: how long a new model gets a copy of every request, the answers to "
        "which are discarded, before it is evaluated. None: not at all.",
    )
    rollout_timeout_seconds: float = Field(
        default=600.0,
        gt=0,
        description="How long a new version may take until it is served, including pulling a large image.",
    )
    unschedulable_timeout_seconds: float = Field(
        default=120.0, gt=0, description="How long a pod may wait for a node with enough resources."
    )
    blocked_timeout_seconds: float = Field(
        default=45.0, gt=0, description="How long to wait for an image that cannot be pulled, or a missing Secret."
    )

    @model_validator(mode="after")
    def _names_hold(self) -> "KServeInferenceService":
        check_service_name(candidate_name(self.name) if self._is_routed else self.name, self.namespace)
        if self.settings.canary_percent and not (self.settings.serverless or self.gateway):
            raise ValueError("canary_percent needs a gateway or mode Knative: nothing else splits requests.")
        if self.shadow_seconds and not self._is_routed:
            raise ValueError("shadow_seconds needs a gateway and mode Standard: nothing else copies requests.")
        if self.host and self._is_routed and not _HOST.fullmatch(self.host):
            raise ValueError(
                f"host {self.host!r} is not a DNS name such as cifar10.example.com, with or without a port: an "
                "HTTPRoute needs one."
            )
        return self

    def deploy(self, request: DeployRequest) -> DeployedService:
        with self._explained(f"model {request.model_digest} was not deployed"):
            view = self._view()
            outcome = self._deployer(view).deploy(request)
            client = self._for_users(view, outcome.service)
        return DeployedService(
            url=client.base_url,
            model_digest=request.model_digest,
            model_version=request.model_version,
            previous_digest=outcome.previous_digest,
            changed=outcome.changed,
            details=self._details(outcome.service, client.base_url),
            headers=client.headers,
        )

    def status(self) -> ServiceStatus:
        try:
            view = self._view()
            service = view.get()
            reason = view.client.last_failure(self.namespace, self.name)
            if service is None:
                return ServiceStatus(False, None, None, None, reason or f"There is no {self._label}.")
            client = self._for_users(view, service)
        except KubernetesError as error:
            return ServiceStatus(False, None, None, None, str(error))
        ready, digest, version = False, None, None
        try:
            served = client.served_model()
            ready, digest, version = served.ready, served.model_digest, served.model_version
        except ServerError as error:
            reason = reason or "; ".join(service.complaints) or str(error)
        details = self._details(service, client.base_url)
        return ServiceStatus(ready, client.base_url, digest, version, reason, details, client.headers)

    def delete(self) -> bool:
        with self._explained("it was not deleted"):
            return self._deployer(self._view()).delete()

    @contextlib.contextmanager
    def _explained(self, failure: str) -> Iterator[None]:
        try:
            yield
        except KubernetesError as error:
            raise DeployError(f"{self._label}: {failure}: {with_notes(error)}", transient=error.transient) from error

    @property
    def _label(self) -> str:
        return f"InferenceService {self.namespace}/{self.name}"

    def _details(self, service: InferenceService, url: str) -> dict[str, str]:
        predictor = predictor_name(self.name)
        details = {
            "deployment": f"KServe, {self.settings.mode} mode",
            "inference_service": f"{self.namespace}/{self.name}",
            "cluster_url": f"http://{predictor}.{self.namespace}.svc",
            "kserve_url": str(service.status.get("url") or ""),
        }
        if self._is_routed:
            details |= {"gateway": f"{self.gateway}", "host": self._host(service)}
        if url.startswith("http://127.0.0.1:") and not self.base_url:
            details["url_is"] = "forwarded by this run's process and gone with it"
            if not self.settings.serverless:
                details["to_reach_it"] = f"kubectl -n {self.namespace} port-forward svc/{predictor} 8080:80"
        return {name: value for name, value in details.items() if value}

    @property
    def _is_routed(self) -> bool:
        """Whether an HTTPRoute routes requests to the service."""
        return bool(self.gateway) and not self.settings.serverless

    def _deployer(self, view: ServiceView) -> ServiceDeployer:
        build = partial(build_inference_service_manifest, self.settings, namespace=self.namespace)
        split = None
        if self.gateway and self._is_routed:
            beside = replace(view, name=candidate_name(self.name))
            candidate = ServiceDeployer(beside, partial(build, name=beside.name))
            split = RouteSplit(view, self.gateway, self._host, candidate, self.shadow_seconds)
        return ServiceDeployer(view, partial(build, name=self.name), split)

    def _client(self) -> InferenceServiceClient:
        return InferenceServiceClient.production(self.kubeconfig_file)

    def _asking(
        self, configuration: k8s.Configuration, in_cluster: bool, service: InferenceService, canary: bool
    ) -> InferenceClient:
        """A client that uses the service like its users; with `canary`, only the newest revision.

        If a route may send requests to another service, it is used without the route.
        """
        name = predictor_name(service.name)
        host = f"{'latest-' if canary else ''}{name}.{service.namespace}.svc"
        headers: dict[str, str] = {}
        if self.base_url and not self._is_routed:
            url, headers = self.base_url.rstrip("/"), {"Host": self._host(service)}
        elif in_cluster:
            url = f"http://{host}"
        elif service.serverless:
            url = _forwarded_url(configuration, *(self.gateway or DEFAULT_GATEWAY).split("/"))
            headers["Host"] = f"{host}.cluster.local"
        else:
            url = _forwarded_url(configuration, service.namespace, name)
        return InferenceClient(url, timeout=_WAKE_SECONDS if service.serverless else _ASK_SECONDS, headers=headers)

    def _for_users(self, view: ServiceView, service: InferenceService) -> InferenceClient:
        """A client that uses the service like its users."""
        if self.base_url and self._is_routed:
            return InferenceClient(self.base_url.rstrip("/"), _ASK_SECONDS, {"Host": self._host(service)})
        return view.asking(service, False)

    def _host(self, service: InferenceService) -> str:
        """Host header of requests that come through an ingress or a gateway."""
        own = f"{predictor_name(service.name)}.{service.namespace}.svc"
        return self.host or urlsplit(service.status.get("url") or "").netloc or own

    def _view(self) -> ServiceView:
        configuration, in_cluster = load_configuration(self.kubeconfig_file)
        return ServiceView(
            client=self._client(),
            asking=partial(self._asking, configuration, in_cluster),
            namespace=self.namespace,
            name=self.name,
            limits=RolloutLimits(
                start_timeout_seconds=self.rollout_timeout_seconds,
                unschedulable_timeout_seconds=self.unschedulable_timeout_seconds,
                blocked_timeout_seconds=self.blocked_timeout_seconds,
            ),
            log=dg.get_dagster_logger(),
        )


class _Forwarder(socketserver.ThreadingTCPServer):
    """Listens on loopback as long as this process lives. Answers 502 if a request cannot be forwarded to a pod."""

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
        """Forward the bytes of one connection in both directions."""
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
        """A socket forwarded to a ready pod of the Service, and its owner."""
        # A separate client, because the stream functions modify the one they use.
        core: Any = k8s.CoreV1Api(k8s.ApiClient(self._configuration))
        service = core.read_namespaced_service(self._service, self._namespace, **_TIMEOUT)
        selector = ",".join(f"{key}={value}" for key, value in service.spec.selector.items())
        found = core.list_namespaced_pod(self._namespace, label_selector=selector, **_TIMEOUT).items
        ready = [pod.metadata.name for pod in found if read_pod(pod, pod.metadata.name).ready]
        if not ready:
            raise LookupError(f"no pod is ready for Service {self._namespace}/{self._service}")
        port = str(next(port.target_port for port in service.spec.ports if port.port == 80))
        call = core.connect_get_namespaced_pod_portforward
        forward = portforward(call, random.choice(ready), self._namespace, ports=port, **_TIMEOUT)
        far = forward.socket(int(port))
        far.setblocking(True)
        return far, forward


_forwarders: dict[tuple[str, str, str], _Forwarder] = {}
_lock = threading.Lock()


def _forwarded_url(configuration: k8s.Configuration, namespace: str, service: str) -> str:
    """Address of this process's port that is forwarded there."""
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
