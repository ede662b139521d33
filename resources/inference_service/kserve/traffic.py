"""Two ways to give a new model requests before it is promoted. No Dagster.

Knative splits the requests between two revisions of one InferenceService. In Standard mode, an HTTPRoute of the Gateway
API splits them between two InferenceServices, or copies them to the second.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from resources.errors import DeployError
from resources.inference_service.client import InferenceClient
from resources.inference_service.interface import DeployRequest
from resources.inference_service.kserve.client import InferenceService
from resources.inference_service.kserve.manifest import (
    DEPLOYMENT_ANNOTATION,
    GROUP,
    KIND,
    VERSION,
    percent_of,
    predictor_name,
)
from resources.inference_service.kserve.watch import NotYetError, ServiceView
from resources.kubernetes.api import CustomResource, CustomResourceClient
from resources.kubernetes.errors import ApiError
from resources.kubernetes.naming import MANAGED_BY_LABEL, candidate_name

if TYPE_CHECKING:
    from resources.inference_service.kserve.deployer import ServiceDeployer

_ROUTES = "gateway.networking.k8s.io"
_MANAGER = "dagster-http-route"
"""Not the label's value of the InferenceService, whose labels KServe copies to a route of its own."""
_INTERRUPT_SECONDS = 5.0
"""How long a write is repeated if there is no time to wait."""


class Split(Protocol):
    """How a new model gets requests before it is promoted. By default, nothing has to be checked or changed for it."""

    def check(self) -> None:
        """Changes nothing. DeployError or KubernetesError if requests cannot be split."""

    def prepare(self, *, wait: bool) -> None:
        """Let the service, which exists, answer all requests. To `wait` raises DeployError if they do not reach it."""

    def is_wanted(self, manifest: Mapping[str, Any]) -> bool:
        """Whether a new model gets requests before it is promoted."""
        ...

    def start(self, manifest: Mapping[str, Any], request: DeployRequest) -> InferenceClient:
        """Serve the model, then give it its part of the requests. The client reaches only this model.

        Raises as `RevisionWatch.wait_until_serving` does.
        """
        ...

    def confirm(self) -> None:
        """DeployError if the started model was changed, or taken over by a later deployment."""

    def end(self, *, wait: bool) -> None:
        """Let the service answer all requests. An interrupt leaves no time to `wait` until that is so."""


@dataclass
class RevisionSplit(Split):
    """The new model is the newest revision of the service, which a later write of the service promotes or replaces."""

    view: ServiceView
    write_and_wait: Callable[[Mapping[str, Any], DeployRequest], InferenceService]
    _canary: InferenceService | None = field(default=None, init=False)

    def is_wanted(self, manifest: Mapping[str, Any]) -> bool:
        return percent_of(manifest) is not None

    def start(self, manifest: Mapping[str, Any], request: DeployRequest) -> InferenceClient:
        self._canary = self.write_and_wait(manifest, request)
        return self.view.asking(self._canary, True)

    def confirm(self) -> None:
        if canary := self._canary:
            seconds = self.view.limits.settle_timeout_seconds
            self.view.until("confirmed", seconds, lambda: self.view.unchanged(canary), tolerated=ApiError)


class Gateway(CustomResource):
    """A Gateway, which is only looked up."""

    kind = "Gateway"


class GatewayClient(CustomResourceClient[Gateway]):
    """Reads Gateways."""

    resource = Gateway
    group, version, plural = _ROUTES, "v1", "gateways"
    operator = "an implementation of the Gateway API"


class HTTPRoute(CustomResource):
    """A stored HTTPRoute."""

    kind = "HTTPRoute"

    def find_missing(self) -> str | None:
        """Why its Gateway does not forward requests as it says; None if it does."""
        wanted = list(map(self._gateway_of, self.body["spec"]["parentRefs"]))
        parents = (self.body.get("status") or {}).get("parents") or ()
        own = [parent for parent in parents if self._gateway_of(parent["parentRef"]) in wanted]
        conditions = [condition for parent in own for condition in parent.get("conditions") or ()]
        if not any(condition["type"] == "Accepted" for condition in conditions):
            return f"no controller has accepted {self} yet: check that one runs for the Gateway's class"
        for condition in conditions:
            if condition.get("observedGeneration", 0) < self.body["metadata"]["generation"]:
                return f"the Gateway has not read the newest version of {self} yet"
            if condition["type"] in ("Accepted", "ResolvedRefs") and condition["status"] != "True":
                return f"{self}: {condition['reason']}: {condition.get('message', '')}"
        return None

    def _gateway_of(self, reference: Mapping[str, Any]) -> tuple[str, str]:
        return reference.get("namespace") or self.namespace, reference["name"]


class HTTPRouteClient(CustomResourceClient[HTTPRoute]):
    """Reads and writes HTTPRoutes."""

    resource = HTTPRoute
    group, version, plural = _ROUTES, "v1", "httproutes"
    operator = "an implementation of the Gateway API"

    def replace(self, current: HTTPRoute, manifest: Mapping[str, Any]) -> HTTPRoute | None:
        """The route with the manifest's content; None if it changed or was deleted meanwhile."""
        version = {"resourceVersion": current.body["metadata"]["resourceVersion"]}
        body = {**manifest, "metadata": {**manifest["metadata"], **version}}
        return self._object("replace", current.namespace, current.name, body, none_on=(404, 409))


class _TakenOverError(DeployError):
    """Another deployment has written the route since this one did."""


@dataclass
class RouteSplit:
    """The new model is a service of its own, which gets its percentage from an HTTPRoute.

    The route names the candidate only after its pods are ready, and no longer before they are deleted. It belongs to
    the service: Kubernetes deletes both together, and a candidate that was left behind.

    Of concurrent deployments, the one that was the last to write the route for the first time owns the route and the
    candidate. The others no longer change either, so that none deletes a candidate that the route of another names.
    """

    view: ServiceView
    gateway: str
    """The route's Gateway as namespace/name."""
    host: Callable[[InferenceService], str]
    """Host header of the requests for a service."""
    candidate: "ServiceDeployer"
    shadow_seconds: float | None = None
    """How long the new model first gets a copy of every request."""
    _has_written: bool = field(default=False, init=False)

    def check(self) -> None:
        if self.view.client.of(GatewayClient).get(*self.gateway.split("/")) is None:
            raise DeployError(f"There is no Gateway {self.gateway} for {self.view}: create it, or correct `gateway`.")
        self._find_route()
        self.candidate.check()

    def prepare(self, *, wait: bool) -> None:
        self._put(0, wait=wait)

    def is_wanted(self, manifest: Mapping[str, Any]) -> bool:
        return bool(percent_of(manifest) or self.shadow_seconds)

    def start(self, manifest: Mapping[str, Any], request: DeployRequest) -> InferenceClient:
        service = self._put(0)
        client = self.candidate.start(request, _owner(service))
        if self.shadow_seconds:
            self._put(0, is_shadowed=True)
            self.candidate.watch(self.shadow_seconds)
        if percent := percent_of(manifest):
            self._put(percent)
        return client

    def confirm(self) -> None:
        self.view.until("confirmed", self.view.limits.settle_timeout_seconds, self._find_route, tolerated=ApiError)

    def end(self, *, wait: bool) -> None:
        try:
            self._put(0, wait=wait)
        except _TakenOverError:
            return
        self.candidate.delete(wait=wait)

    @property
    def _routes(self) -> HTTPRouteClient:
        return self.view.client.of(HTTPRouteClient)

    def _find_route(self) -> HTTPRoute | None:
        """The service's route. DeployError if it was made by others, or another deployment has taken it over."""
        route = self._routes.get(self.view.namespace, self.view.name)
        if route and route.labels.get(MANAGED_BY_LABEL) != _MANAGER:
            raise DeployError(
                f"{route} exists and was not made by this project: it lacks the label {MANAGED_BY_LABEL}={_MANAGER}. "
                "If KServe made it, set disableIngressCreation in the ConfigMap inferenceservice-config. Then delete "
                "it, or give the service another name."
            )
        if route and self._has_written and route.annotations.get(DEPLOYMENT_ANNOTATION) != self.candidate.id:
            raise _TakenOverError(
                f"A later deployment of {self.view} has taken over {route}. This one left both unchanged."
            )
        return route

    def _put(self, percent: int, *, is_shadowed: bool = False, wait: bool = True) -> InferenceService:
        """Route this percentage to the candidate and the rest to the service, which is returned."""

        def write() -> InferenceService:
            service, route = self.view.get(), self._find_route()
            if service is None:
                raise DeployError(f"{self.view} was deleted by someone else.")
            manifest = build_route(service, self.gateway, self.host(service), percent, is_shadowed=is_shadowed)
            manifest["metadata"]["annotations"] = {DEPLOYMENT_ANNOTATION: self.candidate.id}
            stored = self._routes.replace(route, manifest) if route else self._routes.create(manifest)
            if stored is None:
                raise NotYetError("its HTTPRoute was changed by someone else at the same time")
            return service

        def look() -> None:
            route = self._find_route()
            if missing := route.find_missing() if route else "its HTTPRoute was deleted by someone else":
                raise NotYetError(missing)

        seconds = self.view.limits.settle_timeout_seconds if wait else _INTERRUPT_SECONDS
        service = self.view.until("routed", seconds, write)
        self._has_written = True
        if wait:
            self.view.until("routed", seconds, look)
        return service


def build_route(
    service: InferenceService, gateway: str, host: str, percent: int, *, is_shadowed: bool = False
) -> dict[str, Any]:
    """The HTTPRoute that sends this percentage, or a copy of every request, to the candidate.

    With neither, it does not name the candidate, which then need not exist.
    """
    namespace, name = gateway.split("/")
    weights = {service.name: 100 - percent, **({candidate_name(service.name): percent} if percent else {})}
    backends = [{"name": predictor_name(each), "port": 80, "weight": weight} for each, weight in weights.items()]
    rule: dict[str, Any] = {"backendRefs": backends}
    if is_shadowed:
        mirror = {"backendRef": {"name": predictor_name(candidate_name(service.name)), "port": 80}}
        rule["filters"] = [{"type": "RequestMirror", "requestMirror": mirror}]
    return {
        "apiVersion": f"{_ROUTES}/v1",
        "kind": "HTTPRoute",
        "metadata": {
            "name": service.name,
            "namespace": service.namespace,
            "labels": {MANAGED_BY_LABEL: _MANAGER},
            "ownerReferences": [_owner(service)],
        },
        "spec": {
            "parentRefs": [{"namespace": namespace, "name": name}],
            "hostnames": [host.partition(":")[0].lower()],
            "rules": [rule],
        },
    }


def _owner(service: InferenceService) -> dict[str, str]:
    return {"apiVersion": f"{GROUP}/{VERSION}", "kind": KIND, "name": service.name, "uid": service.uid}
