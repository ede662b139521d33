"""An API server, operator and kubelet small enough to act out one failure story at a time, on a clock of its own.

Every story told with it has a twin in tests/cluster that runs against a real cluster; this one runs in milliseconds and
can interrupt at an exact call.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from dagster_k8s.models import k8s_model_from_dict
from kubernetes import client as k8s
from kubernetes.client.exceptions import ApiException

from resources.kubernetes.naming import MANAGED_BY_LABEL
from resources.pytorch_job.client import OPERATOR_JOB_NAME_LABEL, PyTorchJob


class FakeClock:
    """Time that passes only when someone sleeps; due events happen on the way."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._events: list[tuple[float, Callable[[], object]]] = []

    def __call__(self) -> float:
        return self.now

    def after(self, seconds: float, event: Callable[[], object]) -> None:
        self._events.append((self.now + seconds, event))

    def sleep(self, seconds: float) -> None:
        end = self.now + seconds
        while due := [event for event in self._events if event[0] <= end]:
            first = min(due, key=lambda event: event[0])
            self._events.remove(first)
            self.now = max(self.now, first[0])
            first[1]()
        self.now = end


def api_error(status: int, message: str = "", **details: str) -> ApiException:
    error = ApiException(status=status, reason=message)
    error.body = json.dumps({"message": message or f"status {status}", "details": details})
    return error


def not_found(kind: str, name: str) -> ApiException:
    return api_error(404, f'{kind} "{name}" not found', name=name, kind=kind)


def pod_body(job: str, replica: str = "master-0", *, phase: str = "Running", **status: Any) -> dict[str, Any]:
    kind, _, index = replica.partition("-")
    return {
        "metadata": {
            "name": f"{job}-{replica}",
            "uid": f"uid-{job}-{replica}",
            "labels": {
                OPERATOR_JOB_NAME_LABEL: job,
                MANAGED_BY_LABEL: PyTorchJob.managed_by(),
                "training.kubeflow.org/replica-type": kind,
                "training.kubeflow.org/replica-index": index,
            },
        },
        "status": {"phase": phase, **status},
    }


def container_status(state: dict[str, Any], *, restarts: int = 0, last: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "name": "pytorch",
        "image": "image",
        "image_id": "",
        "ready": False,
        "restart_count": restarts,
        "state": state,
        "last_state": last or {},
    }


RUNNING = {"running": {"started_at": "2026-01-01T00:00:00Z"}}


def terminated(exit_code: int, reason: str = "Error", at: str = "2026-01-01T00:01:00Z") -> dict[str, Any]:
    return {"terminated": {"exit_code": exit_code, "reason": reason, "finished_at": at}}


@dataclass
class FakeCluster:
    """Implements the calls of CustomObjectsApi and CoreV1Api that the client makes."""

    clock: FakeClock = field(default_factory=FakeClock)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    pods: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    events: dict[str, list[str]] = field(default_factory=dict)
    num_created: int = 0
    most_active: int = 0
    pod_grace_seconds: float = 30.0
    deleted_pod_graces: list[int] = field(default_factory=list)
    on_created: Callable[["FakeCluster", str], None] = lambda cluster, name: None
    """What the operator does once a job exists."""
    before_create: Callable[[], None] = lambda: None
    after_create: Callable[[], None] = lambda: None
    """Runs before the answer leaves: raising here loses the answer."""
    failing: Callable[[str], None] = lambda call: None

    def create_namespaced_custom_object(
        self, group: str, version: str, namespace: str, plural: str, body: Any, **_: Any
    ):
        self.failing("create")
        self.before_create()
        name = body["metadata"]["name"]
        if name in self.jobs:
            raise api_error(409, f'pytorchjobs "{name}" already exists', name=name)
        stored = copy.deepcopy(body)
        self.num_created += 1
        stored["metadata"] |= {"uid": f"uid-{self.num_created}", "creationTimestamp": f"{self.clock.now:012.3f}"}
        self.jobs[name] = stored
        self._count_active()
        self.on_created(self, name)
        self.after_create()
        return copy.deepcopy(stored)

    def get_namespaced_custom_object(self, group: str, version: str, namespace: str, plural: str, name: str, **_: Any):
        self.failing("get")
        if name not in self.jobs:
            raise not_found("pytorchjobs.kubeflow.org", name)
        return copy.deepcopy(self.jobs[name])

    def list_namespaced_custom_object(self, *_: Any, label_selector: str = "", **__: Any):
        self.failing("list")
        wanted = {key: value for key, _, value in (part.partition("=") for part in label_selector.split(",") if part)}
        found = [job for job in self.jobs.values() if wanted.items() <= job["metadata"].get("labels", {}).items()]
        return {"items": copy.deepcopy(found)}

    def patch_namespaced_custom_object(
        self, group: str, version: str, namespace: str, plural: str, name: str, body, **_
    ):
        self.failing("patch")
        if name not in self.jobs:
            raise not_found("pytorchjobs.kubeflow.org", name)
        self.jobs[name]["metadata"]["labels"] |= body["metadata"]["labels"]
        return copy.deepcopy(self.jobs[name])

    def delete_namespaced_custom_object(
        self, group: str, version: str, namespace: str, plural: str, name: str, body, **_
    ) -> None:
        self.failing("delete")
        job = self.jobs.get(name)
        if job is None:
            raise not_found("pytorchjobs.kubeflow.org", name)
        if job["metadata"]["uid"] != body["preconditions"]["uid"]:
            raise api_error(409, "uid precondition failed")
        del self.jobs[name]
        self.clock.after(self.pod_grace_seconds, lambda: self._remove_pods(name))

    def list_namespaced_pod(self, namespace: str, label_selector: str = "", **_: Any):
        self.failing("list pods")
        wanted = dict(part.split("=") for part in label_selector.split(","))
        found = [body for bodies in self.pods.values() for body in bodies]
        found = [body for body in found if wanted.items() <= body["metadata"]["labels"].items()]
        return SimpleNamespace(items=[k8s_model_from_dict(k8s.V1Pod, body) for body in found])

    def delete_namespaced_pod(self, name: str, namespace: str, body: Any, **_: Any) -> None:
        self.failing("delete pod")
        self.deleted_pod_graces.append(body.grace_period_seconds)
        job = name.rsplit("-", 2)[0]
        for pod in self.pods.get(job, ()):
            pod["metadata"]["deletion_timestamp"] = "2026-01-01T00:00:00Z"
        self.clock.after(body.grace_period_seconds, lambda: self.pods.pop(job, None))

    def read_namespaced_pod_log(self, name: str, namespace: str, previous: bool = False, **_: Any):
        self.failing("log")
        text = self.logs.get(f"{name}/previous" if previous else name)
        if text is None:
            raise api_error(400, "container is waiting to start")
        return SimpleNamespace(data=text.encode())

    def list_namespaced_event(self, namespace: str, field_selector: str = "", **_: Any):
        self.failing("events")
        name = field_selector.split(",")[0].partition("=")[2]
        items = []
        for event in self.events.get(name, []):
            reason, message = event.split(": ", 1)
            items.append(SimpleNamespace(reason=reason, message=message, last_timestamp=None, event_time=None))
        return SimpleNamespace(items=items)

    def condition(self, name: str, kind: str, message: str = "") -> None:
        """Let the operator write a condition. A finished job's running pods are gone with it."""
        if name not in self.jobs:
            return
        conditions = self.jobs[name].setdefault("status", {}).setdefault("conditions", [])
        stamp = f"2026-01-01T00:00:{len(conditions):02d}Z"
        conditions.append({"type": kind, "status": "True", "message": message, "lastTransitionTime": stamp})

    def _remove_pods(self, job: str) -> None:
        if job not in self.jobs:
            self.pods.pop(job, None)

    def _count_active(self) -> None:
        active = [
            job
            for job in self.jobs.values()
            if not {"Succeeded", "Failed"} & {c["type"] for c in job.get("status", {}).get("conditions", [])}
        ]
        self.most_active = max(self.most_active, len(active))


def runs_and_succeeds(seconds: float = 10.0, log: str = "") -> Callable[[FakeCluster, str], None]:
    """An operator and kubelet for which everything goes well."""

    def act(cluster: FakeCluster, name: str) -> None:
        def start() -> None:
            if name in cluster.jobs:
                cluster.pods[name] = [pod_body(name, container_statuses=[container_status(RUNNING)])]
                cluster.logs[f"{name}-master-0"] = log
                cluster.condition(name, "Running")

        def end() -> None:
            cluster.condition(name, "Succeeded")

        cluster.clock.after(1.0, start)
        cluster.clock.after(1.0 + seconds, end)

    return act
