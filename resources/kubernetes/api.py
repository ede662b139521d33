"""Asking a Kubernetes API server: one way to connect and one reading of its answers, for a client of any kind.

Absence and conflict are values. A fault of the connection or of the server is ApiUnavailableError, a refusal
ApiRefusedError; both name the object and chain the original.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, Self, TypeVar

import urllib3.exceptions
from kubernetes import client as k8s
from kubernetes import config as k8s_config
from kubernetes.client.exceptions import ApiException

from resources.kubernetes.errors import ApiRefusedError, ApiUnavailableError, KubernetesError, SettingsError

T = TypeVar("T")

REQUEST_TIMEOUT_SECONDS = 10.0
_TRANSIENT = (0, 401, 408, 410, 425, 429)
"""Besides everything from 500 on. 401: clusters answer it while they rotate keys, and dagster-k8s retries it for the
same reason. 410: the version of the data that the server was to read is gone; the next request gets the present one."""


class CorePods(Protocol):
    """The part of kubernetes.client.CoreV1Api that tells of pods."""

    def list_namespaced_pod(self, *args: Any, **kwargs: Any) -> Any: ...
    def read_namespaced_pod_log(self, *args: Any, **kwargs: Any) -> Any: ...
    def list_namespaced_event(self, *args: Any, **kwargs: Any) -> Any: ...


def load_configuration(
    kubeconfig_file: str | None = None, context: str | None = None
) -> tuple[k8s.Configuration, bool]:
    """How to reach the cluster, and whether that is from a pod inside of it.

    The pod's service account counts where there is one and nothing is named, else a kubeconfig. SettingsError when
    neither is there. Global configuration of the kubernetes package is left alone.
    """
    configuration = k8s.Configuration()
    configuration.retries = 0  # pyright: ignore[reportAttributeAccessIssue]  # a repeated create is the caller's decision, not urllib3's
    try:
        if kubeconfig_file is None and context is None:
            try:
                k8s_config.load_incluster_config(client_configuration=configuration)
                return configuration, True
            except k8s_config.ConfigException:
                k8s_config.load_kube_config(client_configuration=configuration)
        else:
            k8s_config.load_kube_config(kubeconfig_file, context=context, client_configuration=configuration)
    except (k8s_config.ConfigException, OSError) as error:
        raise SettingsError(
            f"No Kubernetes cluster is configured: {error}. Set KUBECONFIG, or run in a pod with a service account."
        ) from error
    return configuration, False


class KubernetesClient:
    """What clients of one custom resource share. `kind` and each advice complete its errors."""

    kind = "object"
    missing_kind_advice = "Install its CRD."
    forbidden_advice = "Give the service account a Role that allows it, or check the namespace's quota."
    invalid_advice = "Correct the settings."

    def __init__(self, core: CorePods, request_timeout_seconds: float = REQUEST_TIMEOUT_SECONDS):
        self._pods = core
        self.request_timeout_seconds = request_timeout_seconds

    def log(
        self,
        namespace: str,
        pod: str,
        container: str,
        *,
        since_seconds: int | None = None,
        tail_lines: int | None = None,
        previous: bool = False,
    ) -> str | None:
        """Time-stamped lines of a container's log, or None when it has none (not started, or gone)."""
        options: dict[str, Any] = {"since_seconds": since_seconds, "tail_lines": tail_lines, "previous": previous}
        response = self._ask_or_none(
            f"read the log of pod {namespace}/{pod}",
            lambda: self._pods.read_namespaced_pod_log(
                pod,
                namespace,
                container=container,
                timestamps=True,
                _preload_content=False,  # the client would otherwise turn lines of JSON into Python reprs
                _request_timeout=self.request_timeout_seconds,
                **{key: value for key, value in options.items() if value},
            ),
            absent_is_none=True,
            bad_request_is_none=True,
        )
        return None if response is None else response.data.decode(errors="replace")

    def warnings(self, namespace: str, name: str) -> list[str]:
        """Warning events of one object, oldest first, as `reason: message`; none where events cannot be read."""
        found = self._events(f"{namespace}/{name}", namespace, name, "type=Warning")
        events = sorted(found, key=lambda event: str(event.last_timestamp or event.event_time or ""))
        return [f"{event.reason}: {event.message}" for event in events]

    def _pods_with(self, what: str, namespace: str, label_selector: str) -> list[Any]:
        """Pods of `what` as the API gives them."""
        body = self._ask(
            f"list the pods of {what}",
            lambda: self._pods.list_namespaced_pod(
                namespace, label_selector=label_selector, _request_timeout=self.request_timeout_seconds
            ),
        )
        return body.items

    def _events(self, what: str, namespace: str, name: str, selector: str) -> list[Any]:
        """Events of one object as the API gives them; none where they cannot be read: they only add to a report."""
        try:
            body = self._ask(
                f"read events of {what}",
                lambda: self._pods.list_namespaced_event(
                    namespace,
                    field_selector=f"involvedObject.name={name},{selector}",
                    _request_timeout=self.request_timeout_seconds,
                ),
            )
        except KubernetesError:
            return []
        return body.items

    def _ask(self, what: str, call: Callable[[], T]) -> T:
        answer = self._ask_or_none(what, call)
        if answer is None:
            raise ApiUnavailableError(f"Could not {what}: the API server's answer is empty.")
        return answer

    def _ask_or_none(
        self,
        what: str,
        call: Callable[[], T],
        *,
        absent_is_none: bool = False,
        conflict_is_none: bool = False,
        bad_request_is_none: bool = False,
    ) -> T | None:
        try:
            return call()
        except ApiException as error:
            code = error.status or 0
            if code in _TRANSIENT or code >= 500:
                raise ApiUnavailableError(f"Could not {what}: HTTP {code}: {_message(error)}") from error
            absent = code == 404 and absent_is_none and not _kind_is_missing(error)
            if absent or (code == 409 and conflict_is_none) or (code == 400 and bad_request_is_none):
                return None
            raise ApiRefusedError(f"Could not {what}: {_message(error)}. {self._advice(error)}") from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ApiUnavailableError(f"Could not {what}: no answer from the API server ({error}).") from error

    def _advice(self, error: ApiException) -> str:
        if error.status == 403:
            return self.forbidden_advice
        if error.status == 404 and "namespaces" in _message(error):
            return "Create the namespace, or correct its name."
        if error.status == 404:
            return f"The cluster has no {self.kind} kind: {self.missing_kind_advice}"
        return self.invalid_advice


class CustomResources(Protocol):
    """The part of kubernetes.client.CustomObjectsApi that every custom resource needs."""

    def create_namespaced_custom_object(self, *args: Any, **kwargs: Any) -> Any: ...
    def get_namespaced_custom_object(self, *args: Any, **kwargs: Any) -> Any: ...
    def delete_namespaced_custom_object(self, *args: Any, **kwargs: Any) -> Any: ...


class Stored(Protocol):
    """What is known of every stored object."""

    @property
    def namespace(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def uid(self) -> str: ...


S = TypeVar("S", bound=Stored)


class CustomResourceClient(KubernetesClient, ABC, Generic[S]):
    """Creates, reads and deletes objects of one custom resource through injected API objects. `parse` reads them."""

    group = ""
    version = ""
    plural = ""

    def __init__(self, resources: Any, core: Any, request_timeout_seconds: float = REQUEST_TIMEOUT_SECONDS):
        super().__init__(core, request_timeout_seconds)
        self._resources: CustomResources = resources

    @classmethod
    def production(cls, kubeconfig_file: str | None = None, context: str | None = None) -> Self:
        """Client of the cluster that `load_configuration` finds. SettingsError when there is none."""
        api = k8s.ApiClient(load_configuration(kubeconfig_file, context)[0])
        return cls(k8s.CustomObjectsApi(api), k8s.CoreV1Api(api))

    @abstractmethod
    def parse(self, body: Mapping[str, Any]) -> S:
        """The object from the API server's answer."""

    def create(self, manifest: Mapping[str, Any]) -> S | None:
        """The stored object, or None when its name is taken."""
        namespace, name = manifest["metadata"]["namespace"], manifest["metadata"]["name"]
        body = self._ask_or_none(
            f"create {self.kind} {namespace}/{name}",
            lambda: self._resources.create_namespaced_custom_object(
                self.group,
                self.version,
                namespace,
                self.plural,
                manifest,
                _request_timeout=self.request_timeout_seconds,
            ),
            conflict_is_none=True,
        )
        return self.parse(body) if body else None

    def get(self, namespace: str, name: str) -> S | None:
        """The object, or None where there is none of that name."""
        body = self._ask_or_none(
            f"read {self.kind} {namespace}/{name}",
            lambda: self._resources.get_namespaced_custom_object(
                self.group, self.version, namespace, self.plural, name, _request_timeout=self.request_timeout_seconds
            ),
            absent_is_none=True,
        )
        return self.parse(body) if body else None

    def delete(self, found: S) -> None:
        """Ask for the deletion of exactly this object and, after it, of what it owns. One that is gone is no error."""
        self._ask_or_none(
            f"delete {self.kind} {found.namespace}/{found.name}",
            lambda: self._resources.delete_namespaced_custom_object(
                self.group,
                self.version,
                found.namespace,
                self.plural,
                found.name,
                body={"propagationPolicy": "Background", "preconditions": {"uid": found.uid}},
                _request_timeout=self.request_timeout_seconds,
            ),
            absent_is_none=True,
            conflict_is_none=True,  # another object has the name now
        )


def _details(error: ApiException) -> Mapping[str, Any]:
    try:
        body = json.loads(error.body or "{}")
    except (TypeError, ValueError):
        return {}
    return body if isinstance(body, Mapping) else {}


def _message(error: ApiException) -> str:
    return str(_details(error).get("message") or error.body or error.reason or "no reason given").strip().rstrip(".")


def _kind_is_missing(error: ApiException) -> bool:
    """Whether a 404 is about the resource type or the namespace, not about one object."""
    details = _details(error).get("details") or {}
    return error.status == 404 and (not details.get("name") or details.get("kind") == "namespaces")
