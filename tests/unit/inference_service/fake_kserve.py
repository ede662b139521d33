"""An API server, KServe and kubelet small enough to act out one deployment at a time, on a clock of its own.

Every story that uses it has a twin in tests/cluster/test_inference_service.py or was tried by hand as docs/kserve.md
says; this one runs in milliseconds and can fail at an exact call.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from types import SimpleNamespace
from typing import Any

from dagster_k8s.models import k8s_model_from_dict
from kubernetes import client as k8s

from resources.inference_service.client import ServedModel, ServerError
from resources.inference_service.kserve.client import InferenceService
from tests.unit.pytorch_job.fake_cluster import FakeClock, api_error, not_found

GRACE_SECONDS = 7.0
START_SECONDS = 5.0


@dataclass
class FakeKServe:
    """Implements the calls of CustomObjectsApi and CoreV1Api that the client makes, and answers requests."""

    clock: FakeClock = field(default_factory=FakeClock)
    service: dict[str, Any] | None = None
    pods: list[dict[str, Any]] = field(default_factory=list)
    events: list[Any] = field(default_factory=list)
    warnings: dict[str, list[str]] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    behaviors: dict[str, Callable[["FakeKServe", dict[str, Any]], None]] = field(default_factory=dict)
    """What happens to a new pod, by the digest of its model; by default it becomes ready."""
    writes: list[dict[str, Any]] = field(default_factory=list)
    deleted: list[dict[str, Any]] = field(default_factory=list)
    failing: Callable[[str], None] = lambda call: None
    """Called before each call takes effect."""
    after_write: Callable[[], None] = lambda: None
    """Called before the response to a write is sent: raising here loses the response."""

    # The custom resource

    def get_namespaced_custom_object(self, group: str, version: str, namespace: str, plural: str, name: str, **_: Any):
        self.failing("get")
        if self.service is None:
            raise not_found("inferenceservices.serving.kserve.io", name)
        return copy.deepcopy(self.service)

    def create_namespaced_custom_object(
        self, group: str, version: str, namespace: str, plural: str, body: Any, **_: Any
    ):
        self.failing("create")
        if self.service is not None:
            raise api_error(409, "already exists", name=body["metadata"]["name"])
        assert "resourceVersion" not in body["metadata"]
        return self._store({**copy.deepcopy(body), "status": {}})

    def replace_namespaced_custom_object(
        self, group: str, version: str, namespace: str, plural: str, name: str, body: Any, dry_run: str = "", **_: Any
    ):
        self.failing("dry run" if dry_run else "replace")
        assert self.service is not None
        if body["metadata"]["resourceVersion"] != self.service["metadata"]["resourceVersion"]:
            raise api_error(409, "the object has been modified", name=name)
        if dry_run:
            return _with_defaults(copy.deepcopy(body))
        return self._store({**copy.deepcopy(body), "status": self.service["status"]})

    def delete_namespaced_custom_object(
        self, group: str, version: str, namespace: str, plural: str, name: str, body: Any, **_: Any
    ) -> None:
        self.failing("delete")
        if self.service is None:
            raise not_found("inferenceservices.serving.kserve.io", name)
        if self.service["metadata"]["uid"] != body["preconditions"]["uid"]:
            raise api_error(409, "uid precondition failed")
        self.deleted.append(self.service)
        self.service = None
        for pod in list(self.pods):
            self._end(pod)

    # Pods and events

    def list_namespaced_pod(self, namespace: str, **_: Any):
        self.failing("list pods")
        return SimpleNamespace(items=[k8s_model_from_dict(k8s.V1Pod, pod) for pod in self.pods])

    def read_namespaced_pod_log(self, name: str, namespace: str, previous: bool = False, **_: Any):
        self.failing("log")
        text = None if previous else self.logs.get(name)
        if text is None:
            raise api_error(400, "no such log")
        return SimpleNamespace(data=text.encode())

    def list_namespaced_event(self, namespace: str, field_selector: str = "", **_: Any):
        self.failing("events")
        wanted = dict(part.split("=") for part in field_selector.split(","))
        if wanted.get("involvedObject.kind"):
            return SimpleNamespace(items=self.events)
        texts = self.warnings.get(wanted["involvedObject.name"], [])
        split = [text.split(": ", 1) for text in texts if text.startswith(wanted.get("reason", ""))]
        items = [SimpleNamespace(reason=r, message=m, last_timestamp=None, event_time=None) for r, m in split]
        return SimpleNamespace(items=items)

    def create_namespaced_event(self, namespace: str, body: dict[str, Any], **_: Any) -> None:
        self.failing("event")
        self.events.append(
            SimpleNamespace(
                reason=body["reason"],
                message=body["message"],
                reporting_component=body["reportingComponent"],
                event_time=datetime.fromisoformat(body["eventTime"]),
            )
        )

    # Requests

    def client(self, service: InferenceService, canary: bool) -> Any:
        assert canary == (service.canary_percent is not None)
        return SimpleNamespace(service=service, served_model=lambda: self.served_model())

    def served_model(self) -> ServedModel:
        """The response of a ready or terminating pod: a terminating one still serves open connections."""
        answering = [pod for pod in self.pods if is_ready(pod)]
        if not answering:
            raise ServerError("GET http://cifar10-predictor.space.svc got no response: connection refused")
        annotations = answering[0]["metadata"]["annotations"]
        return ServedModel(True, annotations["cifar/model-digest"], annotations["cifar/model-version"])

    # What the controllers do

    def _store(self, body: dict[str, Any]) -> dict[str, Any]:
        if self.service and _with_defaults(body) == self.service:  # an API server keeps the generation
            return copy.deepcopy(body)
        self.writes.append(_with_defaults(body))
        uid = body["metadata"].get("uid") or f"uid-{len(self.writes)}"
        body["metadata"] |= {"uid": uid, "resourceVersion": str(len(self.writes))}
        self.service = body
        self._reconcile(body)
        self.after_write()
        return copy.deepcopy(body)

    def _reconcile(self, body: dict[str, Any]) -> None:
        annotations = body["metadata"]["annotations"]
        template = template_of(body)
        mine = [pod for pod in self.pods if _template(pod) == template and not is_ending(pod)]
        if any(is_ready(pod) for pod in mine):
            self.set_ready(True)
            self.clock.after(1.0, lambda: self._retire_others(template))
            return
        pod = pod_body(f"pod-{len(self.writes)}", annotations, template)
        behave = self.behaviors.get(annotations["cifar/model-digest"], gets_ready)
        self.clock.after(0.5, lambda: self._start(pod, behave))

    def _start(self, pod: dict[str, Any], behave: Callable[["FakeKServe", dict[str, Any]], None]) -> None:
        if self.service and template_of(self.service) == _template(pod):
            self.pods.append(pod)
            behave(self, pod)

    def _retire_others(self, template: str) -> None:
        if self.service and template_of(self.service) == template:
            for pod in [pod for pod in self.pods if _template(pod) != template]:
                self._end(pod)

    def _end(self, pod: dict[str, Any]) -> None:
        if not is_ending(pod) and pod["status"]["phase"] != "Failed":  # a ReplicaSet keeps failed ones
            pod["metadata"]["deletion_timestamp"] = "2026-01-01T00:00:00Z"
            self.clock.after(GRACE_SECONDS, lambda: pod in self.pods and self.pods.remove(pod))

    def make_ready(self, pod: dict[str, Any]) -> None:
        if pod in self.pods and not is_ending(pod):
            pod["status"] = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
            self.set_ready(True)
            self._retire_others(_template(pod))

    def set_ready(self, ready: bool, message: str = "") -> None:
        if self.service is not None:
            status = {"type": "PredictorReady", "status": str(ready), "reason": "Reason", "message": message}
            self.service["status"] = {"conditions": [{**status, "type": "Ready"}, status]}


def template_of(service: dict[str, Any]) -> str:
    """Identifies the template of its pods, to which the service's annotations are copied."""
    scaling = ("canaryTrafficPercent", "minReplicas", "maxReplicas")
    predictor = {key: value for key, value in service["spec"]["predictor"].items() if key not in scaling}
    return json.dumps([predictor, service["metadata"]["annotations"]], sort_keys=True)


def _template(pod: dict[str, Any]) -> str:
    return pod["metadata"]["labels"].get("template", "")


def _with_defaults(body: dict[str, Any]) -> dict[str, Any]:
    """The object as KServe's webhook and the API server store it."""
    body["spec"]["predictor"].setdefault("timeout", 60)
    return body


def is_ending(pod: dict[str, Any]) -> bool:
    return "deletion_timestamp" in pod["metadata"]


def is_ready(pod: dict[str, Any]) -> bool:
    return {"type": "Ready", "status": "True"} in pod["status"].get("conditions", [])


def pod_body(name: str, annotations: dict[str, str], template: str = "") -> dict[str, Any]:
    metadata = {"name": name, "uid": f"uid-{name}", "annotations": dict(annotations), "labels": {"template": template}}
    return {"metadata": metadata, "status": {"phase": "Pending"}}


def container(state: dict[str, Any], *, restarts: int = 0) -> dict[str, Any]:
    return {
        "name": "kserve-container",
        "image": "image",
        "image_id": "",
        "ready": False,
        "restart_count": restarts,
        "state": state,
        "last_state": {},
    }


def gets_ready(cluster: FakeKServe, pod: dict[str, Any]) -> None:
    cluster.clock.after(START_SECONDS, lambda: cluster.make_ready(pod))


def ends(exit_code: int, *, restarts: int = 0, reason: str = "Error", log: str = ""):
    """The server exits again and again."""

    def act(cluster: FakeKServe, pod: dict[str, Any]) -> None:
        def end(times: int) -> None:
            at = f"2026-01-01T00:00:{times:02d}Z"
            state = {"terminated": {"exit_code": exit_code, "reason": reason, "finished_at": at}}
            pod["status"] = {"phase": "Running", "container_statuses": [container(state, restarts=times)]}

        cluster.logs[pod["metadata"]["name"]] = f"2026-01-01T00:00:00Z {log}\n"
        for times in range(restarts + 1):
            cluster.clock.after(3.0 + 10 * times, lambda times=times: end(times))

    return act


def waits(reason: str, message: str):
    """The container is never started."""

    def act(cluster: FakeKServe, pod: dict[str, Any]) -> None:
        state = {"waiting": {"reason": reason, "message": message}}
        pod["status"] = {"phase": "Pending", "container_statuses": [container(state)]}

    return act


def fits_nowhere(message: str):
    def act(cluster: FakeKServe, pod: dict[str, Any]) -> None:
        condition = {"type": "PodScheduled", "status": "False", "message": message}
        pod["status"] = {"phase": "Pending", "conditions": [condition]}
        cluster.warnings[pod["metadata"]["name"]] = [f"FailedScheduling: {message}"]

    return act


def mounts_nothing(message: str, *later: str):
    """The kubelet waits for a volume, which only an event says."""

    def act(cluster: FakeKServe, pod: dict[str, Any]) -> None:
        waits("ContainerCreating", "")(cluster, pod)
        cluster.warnings[pod["metadata"]["name"]] = [f"FailedMount: {message}", *later]

    return act


def never_ready(cluster: FakeKServe, pod: dict[str, Any]) -> None:
    pod["status"] = {"phase": "Running", "container_statuses": [container({"running": {}})]}
    cluster.logs[pod["metadata"]["name"]] = "2026-01-01T00:00:00Z waiting for the object store\n"


def gets_no_pod(cluster: FakeKServe, pod: dict[str, Any]) -> None:
    cluster.pods.remove(pod)
    cluster.set_ready(False, "exceeded quota: pods=10")


class FakeKnative(FakeKServe):
    """The same in serverless mode: revisions, and a fraction of the requests for the latest one."""

    def __init__(self) -> None:
        super().__init__()
        self.template = ""
        self.created = self.ready = self.rolled_out = 0
        self.digests: dict[int, str] = {}
        self.shares: list[dict[str, int]] = []
        """Fraction of the requests by digest, after each change."""

    def served_model(self) -> ServedModel:
        """The newest ready revision: the canary, or the one that gets all requests."""
        if not self.ready:
            raise ServerError("no revision is ready")
        digest = self.digests[self.ready]
        return ServedModel(True, digest, "1" if digest[0] == "a" else "2")

    def _reconcile(self, body: dict[str, Any]) -> None:
        annotations = body["metadata"]["annotations"]
        if template_of(body) != self.template:
            self.template = template_of(body)
            self.created += 1
            self.digests[self.created] = annotations["cifar/model-digest"]
            pod = pod_body(f"pod-{self.created}", annotations, self.template)
            pod["metadata"]["labels"]["serving.knative.dev/revision"] = f"r{self.created}"
            behave = self.behaviors.get(annotations["cifar/model-digest"], gets_ready)
            self.clock.after(0.5, lambda: self._start(pod, behave))
        self.clock.after(1.0, self._route)

    def make_ready(self, pod: dict[str, Any]) -> None:
        pod["status"] = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
        self.ready = int(pod["metadata"]["labels"]["serving.knative.dev/revision"][1:])
        self._route()

    def _route(self) -> None:
        if self.service is None or not self.ready:
            return
        percent = self.service["spec"]["predictor"].get("canaryTrafficPercent")
        percent = 100 if percent is None or not self.rolled_out else percent
        if percent == 100:
            self.rolled_out = self.ready
        traffic = [{"revisionName": f"r{self.ready}", "latestRevision": True, "percent": percent}]
        if percent < 100:
            traffic.append({"revisionName": f"r{self.rolled_out}", "latestRevision": False, "percent": 100 - percent})
        names = {"latestCreatedRevision": f"r{self.created}", "latestReadyRevision": f"r{self.ready}"}
        self.set_ready(self.ready == self.created)
        self.service["status"]["components"] = {"predictor": {**names, "traffic": traffic}}
        share: dict[str, int] = {}
        for target in traffic:
            digest = self.digests[int(target["revisionName"][1:])]
            share[digest] = share.get(digest, 0) + target["percent"]
        if not self.shares or self.shares[-1] != share:
            self.shares.append(share)
