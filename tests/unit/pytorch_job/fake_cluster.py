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

from resources.kubernetes.job import Job, JobClient
from resources.kubernetes.job_config import JobConfig
from resources.kubernetes.naming import MANAGED_BY_LABEL
from resources.kubernetes.pipes import PipesJobClient
from resources.kubernetes.queue import WorkloadClient
from resources.pytorch_job.client import (
    OPERATOR_JOB_NAME_LABEL,
    PipesPyTorchJobClient,
    PyTorchJob,
    PyTorchJobClient,
)
from resources.pytorch_job.config import PyTorchJobConfig
from resources.train_job.client import (
    INDEX_ANNOTATION,
    JOBSET_NAME_LABEL,
    REPLICATED_JOB_LABEL,
    JobSetClient,
    PipesTrainJobClient,
    TrainJobClient,
)
from resources.train_job.config import TrainJobConfig


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


def _pytorch_condition(job: dict[str, Any], kind: str, message: str) -> None:
    conditions = job.setdefault("status", {}).setdefault("conditions", [])
    stamp = f"2026-01-01T00:00:{len(conditions):02d}Z"
    conditions.append({"type": kind, "status": "True", "message": message, "lastTransitionTime": stamp})


def _train_condition(job: dict[str, Any], kind: str, message: str) -> None:
    """As Trainer 2.3.0 says the same: by spec.suspend, three conditions, and the numbers of child Jobs."""
    status = job.setdefault("status", {})
    job.setdefault("spec", {})["suspend"] = kind == "Suspended"
    status["conditions"] = [{"type": "Suspended", "status": str(kind == "Suspended"), "message": "TrainJob is ..."}]
    if kind in ("Failed", "Succeeded"):
        final = "Complete" if kind == "Succeeded" else kind
        status["conditions"].append({"type": final, "status": "True", "message": message})
    status["jobsStatus"] = [{"name": "node", "active": 1, "ready": int(kind == "Running"), "succeeded": 0, "failed": 0}]


@dataclass(frozen=True)
class Kind:
    """A kind of job, and how its operator writes a status."""

    client: type[JobClient[Any]]
    pipes: type[PipesJobClient[Any]]
    config: type[JobConfig]
    write_condition: Callable[[dict[str, Any], str, str], None]
    deadline_message: str
    deadline_spec: dict[str, Any]
    """A spec with a deadline of 1000 s."""

    @property
    def job(self) -> type[Job]:
        client: Any = self.client
        return client.resource

    @property
    def key(self) -> str:
        """Its name in metadata."""
        return self.job.slug.replace("-", "_")


PYTORCH_JOB = Kind(
    PyTorchJobClient,
    PipesPyTorchJobClient,
    PyTorchJobConfig,
    _pytorch_condition,
    "Job job has failed because it was active longer than specified deadline",
    {"runPolicy": {"activeDeadlineSeconds": 1000}},
)
TRAIN_JOB = Kind(
    TrainJobClient,
    PipesTrainJobClient,
    TrainJobConfig,
    _train_condition,
    "TrainJob exceeded its active deadline",
    {"activeDeadlineSeconds": 1000},
)
KINDS = (PYTORCH_JOB, TRAIN_JOB)


def pod_body(job: str, replica: str = "master-0", *, phase: str = "Running", **status: Any) -> dict[str, Any]:
    """A pod with the labels of both kinds' operators."""
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
                JOBSET_NAME_LABEL: job,
                REPLICATED_JOB_LABEL: kind,
            },
            "annotations": {INDEX_ANNOTATION: index},
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

    kind: Kind = PYTORCH_JOB
    installed: tuple[Kind, ...] = KINDS
    clock: FakeClock = field(default_factory=FakeClock)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)
    jobsets: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What outlives a TrainJob for a time."""
    workloads: list[dict[str, Any]] = field(default_factory=list)
    """Of Kueue."""
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

    def get_api_resources(self, group: str, version: str, **_: Any):
        self.failing("discover")
        plurals = [kind.client.plural for kind in self.installed if kind.client.group == group]
        if not plurals:
            raise api_error(404, "the server could not find the requested resource")
        return SimpleNamespace(resources=[SimpleNamespace(name=plural) for plural in plurals])

    def create_namespaced_custom_object(
        self, group: str, version: str, namespace: str, plural: str, body: Any, **_: Any
    ):
        self.failing("create")
        self.before_create()
        name = body["metadata"]["name"]
        if name in self.jobs:
            raise api_error(409, f'{plural} "{name}" already exists', name=name)
        stored = copy.deepcopy(body)
        self.num_created += 1
        stored["metadata"] |= {"uid": f"uid-{self.num_created}", "creationTimestamp": f"{self.clock.now:012.3f}"}
        self.jobs[name] = stored
        if self.kind is TRAIN_JOB:
            self.jobsets[name] = {"metadata": {"uid": f"set-{name}", **stored["metadata"]}}
        self._count_active()
        self.on_created(self, name)
        self.after_create()
        return copy.deepcopy(stored)

    def get_namespaced_custom_object(self, group: str, version: str, namespace: str, plural: str, name: str, **_: Any):
        self.failing("get")
        stored = self.jobsets if plural == JobSetClient.plural else self.jobs
        if name not in stored:
            raise not_found(f"{plural}.{group}", name)
        return copy.deepcopy(stored[name])

    def list_namespaced_custom_object(
        self, group: str, version: str, namespace: str, plural: str, *, label_selector: str = "", **_: Any
    ):
        self.failing("list workloads" if plural == WorkloadClient.plural else "list")
        wanted = {key: value for key, _, value in (part.partition("=") for part in label_selector.split(",") if part)}
        stored = self.workloads if plural == WorkloadClient.plural else self.jobs.values()
        found = [job for job in stored if wanted.items() <= job["metadata"].get("labels", {}).items()]
        return {"items": copy.deepcopy(found)}

    def patch_namespaced_custom_object(
        self, group: str, version: str, namespace: str, plural: str, name: str, body, **_
    ):
        self.failing("patch")
        if name not in self.jobs:
            raise not_found(f"{plural}.{group}", name)
        self.jobs[name]["metadata"]["labels"] |= body["metadata"]["labels"]
        return copy.deepcopy(self.jobs[name])

    def delete_namespaced_custom_object(
        self, group: str, version: str, namespace: str, plural: str, name: str, body, **_
    ) -> None:
        self.failing("delete")
        if plural == JobSetClient.plural:
            self.jobsets.pop(name, None)
            return
        job = self.jobs.get(name)
        if job is None:
            raise not_found(f"{plural}.{group}", name)
        if job["metadata"]["uid"] != body["preconditions"]["uid"]:
            raise api_error(409, "uid precondition failed")
        del self.jobs[name]
        self.clock.after(1.0, lambda: self.jobsets.pop(name, None))
        self.clock.after(self.pod_grace_seconds, lambda: self._remove_pods(name))

    def list_namespaced_pod(self, namespace: str, label_selector: str = "", **_: Any):
        self.failing("list pods")
        wanted = dict(part.split("=") for part in label_selector.split(","))
        found = [body for bodies in self.pods.values() for body in bodies]
        found = [self._labelled(body) for body in found]
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
        self.kind.write_condition(self.jobs[name], kind, message)

    def _labelled(self, pod: dict[str, Any]) -> dict[str, Any]:
        """The pod, managed by what manages the jobs of the kind."""
        body = copy.deepcopy(pod)
        labels = body["metadata"]["labels"]
        if labels.get(MANAGED_BY_LABEL) == PyTorchJob.managed_by():
            labels[MANAGED_BY_LABEL] = self.kind.job.managed_by()
        return body

    def _remove_pods(self, job: str) -> None:
        if job not in self.jobs:
            self.pods.pop(job, None)

    def _count_active(self) -> None:
        active = [job for job in self.jobs.values() if not self.kind.job(job).finished]
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
