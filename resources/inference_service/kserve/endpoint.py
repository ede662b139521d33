"""Where a service answers, seen from where this process runs, and what it says there."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from kubernetes import client as k8s

from resources.inference_service.client import InferenceClient, ServedModel, ServerError
from resources.inference_service.kserve.client import InferenceService
from resources.inference_service.kserve.manifest import predictor_name
from resources.inference_service.kserve.tunnel import ServiceTunnel

_CANARY_TAG = "latest-"
_ASK_SECONDS = 10.0
_WAKE_SECONDS = 60.0
"""A serverless revision without pods takes this long at most to get one."""


@dataclass(frozen=True)
class Address:
    """Where requests go, and what they have to carry to arrive."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)


class ServiceEndpoint:
    """Finds a service's address in one of three ways.

    With `base_url`: through an ingress or whatever else leads there. In a pod: by the cluster's own DNS. Else: through
    a port that this process forwards, to the service's pods or, for a serverless one, to Knative's gateway.
    """

    def __init__(
        self,
        configuration: k8s.Configuration,
        *,
        in_cluster: bool,
        base_url: str | None = None,
        host: str | None = None,
        gateway: str,
    ):
        self._configuration = configuration
        self._in_cluster = in_cluster
        self._base_url = base_url
        self._host = host
        self._gateway = gateway

    def address(self, service: InferenceService, *, canary: bool = False) -> Address:
        """Where its users reach it; with `canary`, where its newest revision alone answers."""
        host = f"{_CANARY_TAG if canary else ''}{predictor_name(service.name)}.{service.namespace}.svc"
        if self._base_url:
            return Address(self._base_url.rstrip("/"), {"Host": self._host or _host_of(service) or host})
        if self._in_cluster:
            return Address(f"http://{host}")
        if service.serverless:
            namespace, _, gateway = self._gateway.partition("/")
            return Address(self._tunnel(namespace, gateway), {"Host": f"{host}.cluster.local"})
        return Address(self._tunnel(service.namespace, predictor_name(service.name)))

    def client(self, service: InferenceService, *, canary: bool = False) -> InferenceClient:
        address = self.address(service, canary=canary)
        return InferenceClient(
            address.url, timeout=_WAKE_SECONDS if service.serverless else _ASK_SECONDS, headers=address.headers
        )

    def served_model(self, service: InferenceService, *, canary: bool | None = None) -> ServedModel:
        """What answers; by default the canary where there is one. ServerError where nothing does."""
        client = self.client(service, canary=service.canary_percent is not None if canary is None else canary)
        try:
            return client.served_model()
        except ServerError as error:
            with _tunnels_lock:
                tunnel = next((tunnel for tunnel in _tunnels.values() if tunnel.url == client.base_url), None)
            if tunnel and tunnel.problem:
                raise ServerError(f"{error} A port could not be forwarded: {tunnel.problem}") from error
            raise

    def _tunnel(self, namespace: str, service: str) -> str:
        return _tunnel_to(self._configuration, namespace, service)


_tunnels: dict[tuple[str, str, str], ServiceTunnel] = {}
_tunnels_lock = threading.Lock()


def _tunnel_to(configuration: k8s.Configuration, namespace: str, service: str) -> str:
    """Address of this process's one tunnel there."""
    key = (configuration.host, namespace, service)
    with _tunnels_lock:
        if key not in _tunnels:
            _tunnels[key] = ServiceTunnel(configuration, namespace, service)
        return _tunnels[key].url


def _host_of(service: InferenceService) -> str | None:
    url = service.status.get("url")
    return urlsplit(url).netloc if url else None
