"""A Gateway, its HTTPRoutes, and two InferenceServices between which one of them splits requests."""

import copy
from typing import Any

from resources.inference_service.kserve.client import InferenceService
from tests.unit.inference_service.fake_kserve import FakeKServe
from tests.unit.pytorch_job.fake_cluster import FakeClock, api_error, not_found

CANARY = "cifar10-canary"


class FakeGateway:
    """Implements the calls of CustomObjectsApi and CoreV1Api for both services, and for routes."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.main, self.candidate = FakeKServe(self.clock), FakeKServe(self.clock)
        self.gateways = {"web"}
        self.route: dict[str, Any] | None = None
        self.is_installed = True
        self.refusal: tuple[str, str] | None = None
        """Reason and message with which the Gateway refuses the route."""
        self.num_conflicts = 0
        """How many of the next writes of the route fail because someone else changed it."""
        self.weights: list[dict[str, int]] = []
        """Weights of the services after each change of the route; 0 for the target of a mirror."""

    def get_namespaced_custom_object(self, group: str, version: str, namespace: str, plural: str, name: str, **_: Any):
        if plural == "inferenceservices":
            return self._of(name).get_namespaced_custom_object(group, version, namespace, plural, name)
        if not self.is_installed:
            raise api_error(404, "the server could not find the requested resource")
        if plural == "gateways":
            if name not in self.gateways:
                raise not_found(f"gateways.{group}", name)
            return {"metadata": {"name": name, "namespace": namespace}}
        if self.route is None:
            raise not_found(f"httproutes.{group}", name)
        return copy.deepcopy(self.route)

    def create_namespaced_custom_object(
        self, group: str, version: str, namespace: str, plural: str, body: Any, **_: Any
    ) -> Any:
        if plural == "inferenceservices":
            name = body["metadata"]["name"]
            return self._of(name).create_namespaced_custom_object(group, version, namespace, plural, body)
        assert self.route is None
        return self._store(body)

    def replace_namespaced_custom_object(
        self, group: str, version: str, namespace: str, plural: str, name: str, body: Any, **options: Any
    ) -> Any:
        if plural == "inferenceservices":
            replace = self._of(name).replace_namespaced_custom_object
            return replace(group, version, namespace, plural, name, body, **options)
        assert self.route is not None
        if self.num_conflicts:
            self.num_conflicts -= 1
            raise api_error(409, "the object has been modified", name=name)
        assert body["metadata"]["resourceVersion"] == self.route["metadata"]["resourceVersion"]
        return self._store(body)

    def delete_namespaced_custom_object(self, *args: Any, body: Any, **_: Any) -> None:
        self._of(args[-1]).delete_namespaced_custom_object(*args, body=body)

    def list_namespaced_pod(self, namespace: str, label_selector: str, **_: Any) -> Any:
        return self._of(label_selector.partition("=")[2]).list_namespaced_pod(namespace)

    def read_namespaced_pod_log(self, name: str, namespace: str, **options: Any) -> Any:
        has_it = name in self.candidate.logs
        return (self.candidate if has_it else self.main).read_namespaced_pod_log(name, namespace, **options)

    def list_namespaced_event(self, namespace: str, **options: Any) -> Any:
        return self.main.list_namespaced_event(namespace, **options)

    def create_namespaced_event(self, namespace: str, body: Any, **_: Any) -> None:
        self.main.create_namespaced_event(namespace, body)

    def client(self, service: InferenceService, canary: bool) -> Any:
        return self._of(service.name).client(service, canary)

    def _of(self, name: str) -> FakeKServe:
        return self.candidate if name == CANARY else self.main

    def _store(self, body: dict[str, Any]) -> dict[str, Any]:
        """Keeps the route. A candidate that it names has to serve, before and after."""
        if any(CANARY in backend["name"] for backend in [*self._backends(self.route), *self._backends(body)]):
            self.candidate.served_model()
        number = len(self.weights) + 1
        weights = {backend["name"]: backend.get("weight", 0) for backend in self._backends(body)}
        if self.route is None or self._backends(self.route) != self._backends(body):
            self.weights.append(weights)
        conditions = [{"type": "Accepted", "status": "True", "observedGeneration": number}]
        if self.refusal:
            conditions[0] |= {"status": "False", "reason": self.refusal[0], "message": self.refusal[1]}
        metadata = {**body["metadata"], "uid": "route", "resourceVersion": f"{number}", "generation": number}
        parents = [{"parentRef": each, "conditions": conditions} for each in body["spec"]["parentRefs"]]
        self.route = {**copy.deepcopy(body), "metadata": metadata, "status": {"parents": parents}}
        return copy.deepcopy(self.route)

    @staticmethod
    def _backends(route: dict[str, Any] | None) -> list[dict[str, Any]]:
        if route is None:
            return []
        (rule,) = route["spec"]["rules"]
        return [*rule["backendRefs"], *(each["requestMirror"]["backendRef"] for each in rule.get("filters", ()))]
