"""Requests to a Kubernetes API server: connecting and interpreting responses, for clients of any kind.

Absence and conflict are return values. A connection or server fault is ApiUnavailableError, a refusal ApiRefusedError;
both name the object and chain the original.
"""

import contextlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar

import urllib3.exceptions
from kubernetes import client as k8s
from kubernetes import config as k8s_config
from kubernetes.client.exceptions import ApiException

from resources.kubernetes.errors import ApiRefusedError, ApiUnavailableError, KubernetesError, SettingsError
from resources.kubernetes.pods import Pod, read_pod

REQUEST_TIMEOUT_SECONDS = 10.0
_TRANSIENT = (0, 401, 408, 410, 425, 429)
"""In addition to 500 and above. 401: returned while a cluster rotates keys; dagster-k8s retries it for the same reason.
410: the requested resource version is gone; the next request gets the current one."""


def load_configuration(kubeconfig_file: str | None = None) -> tuple[k8s.Configuration, bool]:
    """The client configuration, and whether this process runs in a pod of the cluster.

    Without a file, uses the pod's service account if there is one, else KUBECONFIG. SettingsError when neither exists.
    The kubernetes package's global configuration is not changed.
    """
    configuration = k8s.Configuration()
    configuration.retries = 0  # pyright: ignore[reportAttributeAccessIssue]  # a repeated create is the caller's decision, not urllib3's
    try:
        if kubeconfig_file is None:
            with contextlib.suppress(k8s_config.ConfigException):
                k8s_config.load_incluster_config(client_configuration=configuration)
                return configuration, True
        k8s_config.load_kube_config(kubeconfig_file, client_configuration=configuration)
    except (k8s_config.ConfigException, OSError) as error:
        raise SettingsError(
            f"No Kubernetes cluster is configured: {error}. Set KUBECONFIG, or run in a pod with a service account."
        ) from error
    return configuration, False


@dataclass(frozen=True)
class CustomResource:
    """A stored object. A kind adds the interpretation of its status."""

    kind: ClassVar[str] = "object"
    body: Mapping[str, Any]
    """As received from the API server; do not modify."""

    @property
    def name(self) -> str:
        return self.body["metadata"]["name"]

    @property
    def namespace(self) -> str:
        return self.body["metadata"]["namespace"]

    @property
    def uid(self) -> str:
        return self.body["metadata"]["uid"]

    @property
    def deleting(self) -> bool:
        return "deletionTimestamp" in self.body["metadata"]

    @property
    def labels(self) -> Mapping[str, str]:
        return self.body["metadata"].get("labels") or {}

    @property
    def annotations(self) -> Mapping[str, str]:
        return self.body["metadata"].get("annotations") or {}

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"


S = TypeVar("S", bound=CustomResource)
C = TypeVar("C", bound="CustomResourceClient[Any]")


class CustomResourceClient(Generic[S]):
    """Reads and writes objects of one custom resource, its pods' logs and its events, through injected API objects.

    A kind sets the class attributes. No waiting, no policy.
    """

    resource: type[S]
    group: ClassVar[str]
    version: ClassVar[str]
    plural: ClassVar[str]
    pod_label: ClassVar[str]
    """Label with the object's name on its pods."""
    operator: ClassVar[str]
    """The operator of the kind, which has to be installed."""

    def __init__(self, custom: Any, core: Any, request_timeout_seconds: float = REQUEST_TIMEOUT_SECONDS):
        self._custom = custom
        self._core = core
        self.request_timeout_seconds = request_timeout_seconds

    @classmethod
    def production(cls, kubeconfig_file: str | None = None) -> Self:
        """Client for the cluster that `load_configuration` finds. SettingsError if there is none."""
        api = k8s.ApiClient(load_configuration(kubeconfig_file)[0])
        return cls(k8s.CustomObjectsApi(api), k8s.CoreV1Api(api))

    def of(self, kind: type[C]) -> C:
        """A client of another kind on the same connection."""
        return kind(self._custom, self._core, self.request_timeout_seconds)

    def is_installed(self) -> bool:
        """Whether the cluster has the kind. Discovery needs no permissions."""
        what = f"look for {self.resource.kind}s in the cluster"
        try:
            known = self._ask(what, self._custom.get_api_resources, self.group, self.version)
        except ApiRefusedError as error:
            if isinstance(error.__cause__, ApiException) and error.__cause__.status == 404:
                return False
            raise
        return any(each.name == self.plural for each in known.resources)

    def create(self, manifest: Mapping[str, Any]) -> S | None:
        """The stored object, or None if its name is taken."""
        metadata = manifest["metadata"]
        return self._object("create", metadata["namespace"], metadata["name"], manifest, none_on=(409,))

    def get(self, namespace: str, name: str) -> S | None:
        """The object, or None if it does not exist."""
        return self._object("get", namespace, name, none_on=(404,))

    def find(self, namespace: str, label_selector: str = "") -> list[S]:
        """Objects with the given labels, oldest first."""
        call = self._custom.list_namespaced_custom_object
        what = f"list {self.resource.kind}s in namespace {namespace}"
        body = self._ask(what, call, self.group, self.version, namespace, self.plural, label_selector=label_selector)

        def age(item: Any) -> tuple[str, str]:
            return item["metadata"].get("creationTimestamp") or "", item["metadata"]["name"]

        return [self.resource(item) for item in sorted(body["items"], key=age)]

    def patch(self, found: S, change: Mapping[str, Any]) -> S | None:
        """The object with the change merged into it, or None if it does not exist."""
        body = {**change, "metadata": {**change.get("metadata", {}), "uid": found.uid}}
        return self._object("patch", found.namespace, found.name, body, none_on=(404, 409))

    def delete(self, found: S) -> None:
        """Delete exactly this object and then its dependents. Does nothing if it is gone or was replaced."""
        options = {"propagationPolicy": "Background", "preconditions": {"uid": found.uid}}
        self._object("delete", found.namespace, found.name, body=options, none_on=(404, 409))

    def replica_of(self, pod: Any) -> str:
        """Display name of a V1Pod, such as worker-3."""
        return pod.metadata.name

    def pods(self, namespace: str, name: str) -> list[Pod]:
        """Pods of the object with this name, sorted as master-0, worker-0, worker-10; including leftover ones."""
        pods = self.pods_with(namespace, f"{self.pod_label}={name}")
        return sorted(pods, key=lambda pod: (len(pod.replica), pod.replica))

    def log(self, namespace: str, pod: str, container: str, **options: Any) -> str | None:
        """Timestamped lines of a container's log, or None if it has none (not started, or deleted).

        `options` are those of the API: since_seconds, tail_lines, previous.
        """
        response = self._ask(
            f"read the log of pod {namespace}/{pod}",
            self._core.read_namespaced_pod_log,
            pod,
            namespace,
            container=container,
            timestamps=True,
            _preload_content=False,  # otherwise the client would turn lines of JSON into Python reprs
            none_on=(400, 404),
            **{key: value for key, value in options.items() if value},
        )
        return None if response is None else response.data.decode(errors="replace")

    def warnings(self, namespace: str, name: str) -> list[str]:
        """Warning events of one object, oldest first, as `reason: message`; empty if events cannot be read."""
        found = self._events(namespace, name, "type=Warning")
        events = sorted(found, key=lambda event: str(event.last_timestamp or event.event_time or ""))
        return [f"{event.reason}: {event.message}" for event in events]

    def has_event(self, namespace: str, name: str, reason: str) -> bool:
        """Whether the object has an event with this reason; False if events cannot be read."""
        return bool(self._events(namespace, name, f"reason={reason}"))

    def pods_with(self, namespace: str, label_selector: str) -> list[Pod]:
        call, what = self._core.list_namespaced_pod, f"list the pods of {self.resource.kind}s in {namespace}"
        found = self._ask(what, call, namespace, label_selector=label_selector).items
        return [read_pod(item, self.replica_of(item)) for item in found]

    def _events(self, namespace: str, name: str, selector: str) -> list[Any]:
        """Events of one object as the API returns them; empty if they cannot be read, because they only add detail."""
        call, selector = self._core.list_namespaced_event, f"involvedObject.name={name},{selector}"
        try:
            return self._ask(f"read events of {namespace}/{name}", call, namespace, field_selector=selector).items
        except KubernetesError:
            return []

    def _object(self, verb: str, namespace: str, name: str, *args: Any, **options: Any) -> S | None:
        """The object in the response to a create, get, patch, replace or delete call."""
        call = getattr(self._custom, f"{verb}_namespaced_custom_object")
        names = () if verb == "create" else (name,)
        what = f"{'read' if verb == 'get' else verb} {self.resource.kind} {namespace}/{name}"
        body = self._ask(what, call, self.group, self.version, namespace, self.plural, *names, *args, **options)
        return self.resource(body) if body and verb != "delete" else None

    def _ask(
        self, what: str, call: Callable[..., Any], *args: Any, none_on: Collection[int] = (), **options: Any
    ) -> Any:
        """The response, or None for one of the given status codes. 404 counts only if the kind exists."""
        try:
            return call(*args, _request_timeout=self.request_timeout_seconds, **options)
        except ApiException as error:
            code = error.status or 0
            if code in none_on and not _kind_is_missing(error):
                return None
            if code in _TRANSIENT or code >= 500:
                raise ApiUnavailableError(f"Could not {what}: HTTP {code}: {_message(error)}") from error
            raise ApiRefusedError(f"Could not {what}: {_message(error)}. {self._advice(error)}") from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ApiUnavailableError(f"Could not {what}: no response from the API server ({error}).") from error

    def _advice(self, error: ApiException) -> str:
        if error.status == 403 and "denied the request" not in _message(error):  # which a webhook says
            return "Give the service account a Role that allows it (docs/kubernetes.md), or check the quota."
        if error.status == 404 and "namespaces" in _message(error):
            return "Create the namespace, or correct its name."
        if error.status == 404:
            return f"The cluster has no {self.resource.kind} kind: install {self.operator} and its CRDs."
        return "Correct the settings."


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
