"""A thin typed client of the PyTorchJob custom resource and of its pods. No Dagster, no waiting, no policy.

Absence and conflict are values. A fault of the connection or of the server is ApiUnavailableError, a refusal
ApiRefusedError; both name the object and chain the original.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import urllib3.exceptions
from kubernetes import client as k8s
from kubernetes import config as k8s_config
from kubernetes.client.exceptions import ApiException

from resources.pytorch_job.errors import ApiRefusedError, ApiUnavailableError, JobConfigError
from resources.pytorch_job.labels import LAUNCH_ANNOTATION, OPERATOR_JOB_NAME_LABEL, RUN_ID_LABEL, WORK_ANNOTATION
from resources.pytorch_job.manifest import GROUP, PLURAL, VERSION
from resources.pytorch_job.pods import Pod, read_pod
from resources.pytorch_job.status import JobStatus, read_status

T = TypeVar("T")

REQUEST_TIMEOUT_SECONDS = 10.0
_TRANSIENT = (0, 401, 408, 429, 500, 502, 503, 504)
"""401 is among them as clusters give it while they rotate keys; dagster-k8s retries it for the same reason."""


class CustomObjects(Protocol):
    """The part of kubernetes.client.CustomObjectsApi in use."""

    def create_namespaced_custom_object(self, *args: Any, **kwargs: Any) -> Any: ...
    def get_namespaced_custom_object(self, *args: Any, **kwargs: Any) -> Any: ...
    def list_namespaced_custom_object(self, *args: Any, **kwargs: Any) -> Any: ...
    def patch_namespaced_custom_object(self, *args: Any, **kwargs: Any) -> Any: ...
    def delete_namespaced_custom_object(self, *args: Any, **kwargs: Any) -> Any: ...


class Core(Protocol):
    """The part of kubernetes.client.CoreV1Api in use."""

    def list_namespaced_pod(self, *args: Any, **kwargs: Any) -> Any: ...
    def delete_namespaced_pod(self, *args: Any, **kwargs: Any) -> Any: ...
    def read_namespaced_pod_log(self, *args: Any, **kwargs: Any) -> Any: ...
    def list_namespaced_event(self, *args: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class PyTorchJob:
    """One stored PyTorchJob."""

    name: str
    namespace: str
    uid: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    created_at: str
    deleting: bool
    status: JobStatus

    @property
    def launch_id(self) -> str | None:
        """Id of the create call that made it; None for a job that this package did not make."""
        return self.annotations.get(LAUNCH_ANNOTATION)

    @property
    def work(self) -> str | None:
        return self.annotations.get(WORK_ANNOTATION)

    @property
    def run_id(self) -> str | None:
        return self.labels.get(RUN_ID_LABEL)

    def __str__(self) -> str:
        return f"PyTorchJob {self.namespace}/{self.name}"


class PyTorchJobClient:
    """Reads and writes PyTorchJobs through injected API objects."""

    def __init__(self, custom: CustomObjects, core: Core, request_timeout_seconds: float = REQUEST_TIMEOUT_SECONDS):
        self._custom = custom
        self._core = core
        self.request_timeout_seconds = request_timeout_seconds

    @classmethod
    def production(
        cls,
        *,
        kubeconfig_file: str | None = None,
        context: str | None = None,
        request_timeout_seconds: float = REQUEST_TIMEOUT_SECONDS,
    ) -> "PyTorchJobClient":
        """Client by the pod's service account where there is one and no file is named, else by a kubeconfig.

        JobConfigError when neither is there. Global configuration of the kubernetes package is left alone.
        """
        configuration = k8s.Configuration()
        configuration.retries = 0  # pyright: ignore[reportAttributeAccessIssue]  # a repeated create is this package's decision, not urllib3's
        try:
            if kubeconfig_file is None and context is None:
                try:
                    k8s_config.load_incluster_config(client_configuration=configuration)
                except k8s_config.ConfigException:
                    k8s_config.load_kube_config(client_configuration=configuration)
            else:
                k8s_config.load_kube_config(kubeconfig_file, context=context, client_configuration=configuration)
        except (k8s_config.ConfigException, OSError) as error:
            raise JobConfigError(
                f"No Kubernetes cluster is configured: {error}. Set KUBECONFIG, or run in a pod with a service account."
            ) from error
        api = k8s.ApiClient(configuration)
        return cls(k8s.CustomObjectsApi(api), k8s.CoreV1Api(api), request_timeout_seconds)

    def create(self, manifest: Mapping[str, Any]) -> PyTorchJob | None:
        """The stored job, or None when its name is taken."""
        namespace, name = manifest["metadata"]["namespace"], manifest["metadata"]["name"]
        body = self._ask_or_none(
            f"create PyTorchJob {namespace}/{name}",
            lambda: self._custom.create_namespaced_custom_object(
                GROUP, VERSION, namespace, PLURAL, manifest, _request_timeout=self.request_timeout_seconds
            ),
            conflict_is_none=True,
        )
        return _job(body) if body else None

    def get(self, namespace: str, name: str) -> PyTorchJob | None:
        """The job, or None where there is none of that name."""
        body = self._ask_or_none(
            f"read PyTorchJob {namespace}/{name}",
            lambda: self._custom.get_namespaced_custom_object(
                GROUP, VERSION, namespace, PLURAL, name, _request_timeout=self.request_timeout_seconds
            ),
            absent_is_none=True,
        )
        return _job(body) if body else None

    def find(self, namespace: str, label_selector: str = "") -> list[PyTorchJob]:
        """Jobs with the given labels, oldest first."""
        body = self._ask(
            f"list PyTorchJobs in namespace {namespace}",
            lambda: self._custom.list_namespaced_custom_object(
                GROUP,
                VERSION,
                namespace,
                PLURAL,
                label_selector=label_selector,
                _request_timeout=self.request_timeout_seconds,
            ),
        )
        return sorted((_job(item) for item in body["items"]), key=lambda job: (job.created_at, job.name))

    def set_labels(self, job: PyTorchJob, labels: Mapping[str, str]) -> PyTorchJob | None:
        """The job with some labels changed, or None when it is gone."""
        patch = {"metadata": {"uid": job.uid, "labels": dict(labels)}}
        body = self._ask_or_none(
            f"label {job}",
            lambda: self._custom.patch_namespaced_custom_object(
                GROUP, VERSION, job.namespace, PLURAL, job.name, patch, _request_timeout=self.request_timeout_seconds
            ),
            absent_is_none=True,
            conflict_is_none=True,
        )
        return _job(body) if body else None

    def delete(self, job: PyTorchJob) -> None:
        """Ask for the deletion of exactly this job and, after it, of its pods. One that is gone already is no error."""
        options = {"propagationPolicy": "Background", "preconditions": {"uid": job.uid}}
        self._ask_or_none(
            f"delete {job}",
            lambda: self._custom.delete_namespaced_custom_object(
                GROUP,
                VERSION,
                job.namespace,
                PLURAL,
                job.name,
                body=options,
                _request_timeout=self.request_timeout_seconds,
            ),
            absent_is_none=True,
            conflict_is_none=True,  # another job has the name now
        )

    def pods(self, namespace: str, name: str) -> list[Pod]:
        """Pods of the job of that name, the master first; also those that outlive a deleted job for a moment."""
        body = self._ask(
            f"list the pods of PyTorchJob {namespace}/{name}",
            lambda: self._core.list_namespaced_pod(
                namespace,
                label_selector=f"{OPERATOR_JOB_NAME_LABEL}={name}",
                _request_timeout=self.request_timeout_seconds,
            ),
        )
        return sorted((read_pod(item) for item in body.items), key=lambda pod: (len(pod.replica), pod.replica))

    def delete_pod(self, namespace: str, pod: Pod, grace_seconds: int) -> None:
        """Ask a pod to end within the grace time, which may be shorter than the one it was made with."""
        self._ask_or_none(
            f"delete pod {namespace}/{pod.name}",
            lambda: self._core.delete_namespaced_pod(
                pod.name,
                namespace,
                body=k8s.V1DeleteOptions(
                    grace_period_seconds=grace_seconds, preconditions=k8s.V1Preconditions(uid=pod.uid)
                ),
                _request_timeout=self.request_timeout_seconds,
            ),
            absent_is_none=True,
            conflict_is_none=True,
        )

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
            lambda: self._core.read_namespaced_pod_log(
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
        """Warning events of one object, oldest first, as `reason: message`. None when events may not be read."""
        try:
            body = self._ask(
                f"read events of {namespace}/{name}",
                lambda: self._core.list_namespaced_event(
                    namespace,
                    field_selector=f"involvedObject.name={name},type=Warning",
                    _request_timeout=self.request_timeout_seconds,
                ),
            )
        except ApiRefusedError:
            return []
        events = sorted(body.items, key=lambda event: str(event.last_timestamp or event.event_time or ""))
        return [f"{event.reason}: {event.message}" for event in events]

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
            if code in _TRANSIENT:
                raise ApiUnavailableError(f"Could not {what}: HTTP {code}: {_message(error)}") from error
            absent = code == 404 and absent_is_none and not _kind_is_missing(error)
            if absent or (code == 409 and conflict_is_none) or (code == 400 and bad_request_is_none):
                return None
            raise ApiRefusedError(f"Could not {what}: {_message(error)}. {_advice(error)}") from error
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ApiUnavailableError(f"Could not {what}: no answer from the API server ({error}).") from error


def _job(body: Mapping[str, Any]) -> PyTorchJob:
    metadata = body["metadata"]
    return PyTorchJob(
        name=metadata["name"],
        namespace=metadata["namespace"],
        uid=metadata["uid"],
        labels=metadata.get("labels") or {},
        annotations=metadata.get("annotations") or {},
        created_at=metadata.get("creationTimestamp") or "",
        deleting="deletionTimestamp" in metadata,
        status=read_status(body.get("status")),
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


def _advice(error: ApiException) -> str:
    if error.status == 403:
        return "Give the service account the Role of docs/pytorch_job.md, or check the namespace's quota."
    if error.status == 404 and "namespaces" in _message(error):
        return "Create the namespace, or correct its name."
    if error.status == 404:
        return "The cluster has no PyTorchJob kind: install the Kubeflow training operator (v1) and its CRDs."
    return "Correct the job's settings."
