"""A thin typed client of the PyTorchJob custom resource and of its pods. No Dagster, no waiting, no policy.

Absence and conflict are values. A fault of the connection or of the server is ApiUnavailableError, a refusal
ApiRefusedError; both name the object and chain the original.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from kubernetes import client as k8s

from resources.kubernetes.api import CustomResourceClient
from resources.kubernetes.naming import RUN_ID_LABEL
from resources.kubernetes.pods import Pod, read_pod
from resources.pytorch_job.manifest import GROUP, KIND, PLURAL, VERSION

MANAGED_BY = "dagster-pytorch-job"
# As dagster-k8s has them.
JOB_LABEL = "dagster/job"
OP_LABEL = "dagster/op"

LAUNCH_ANNOTATION = "dagster/pytorch-job-launch"
"""Random id of one create call's intent: the stored object shows whose call made it, and where its messages are."""
WORK_ANNOTATION = "dagster/pytorch-job-work"
"""Digest of what the job computes: only a job with the same one may be adopted."""

OPERATOR_JOB_NAME_LABEL = "training.kubeflow.org/job-name"
OPERATOR_REPLICA_TYPE_LABEL = "training.kubeflow.org/replica-type"
OPERATOR_REPLICA_INDEX_LABEL = "training.kubeflow.org/replica-index"


class JobState(StrEnum):
    """Where a job is on its way. The last two are final."""

    PENDING = "Pending"
    SUSPENDED = "Suspended"
    RUNNING = "Running"
    RESTARTING = "Restarting"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"

    @property
    def finished(self) -> bool:
        return self in (JobState.SUCCEEDED, JobState.FAILED)


@dataclass(frozen=True)
class JobStatus:
    """State with the operator's own words for it."""

    state: JobState
    reason: str = ""
    message: str = ""

    def __str__(self) -> str:
        return f"{self.state} ({self.message})" if self.message else str(self.state)


_FINAL = {"Failed": JobState.FAILED, "Succeeded": JobState.SUCCEEDED}
_PASSING = {
    "Suspended": JobState.SUSPENDED,
    "Running": JobState.RUNNING,
    "Restarting": JobState.RESTARTING,
    "Created": JobState.PENDING,
}


def read_status(status: Mapping[str, Any] | None) -> JobStatus:
    """State of a job from its `status`, which the operator fills only some time after the job exists.

    A final condition decides, wherever it stands in the list: the operator leaves an older Running one true beside it.
    Failed wins over Succeeded, as the operator writes it last when a job exceeds a limit while it ends. Otherwise the
    condition that changed last decides; conditions that are no longer true do not count.
    """
    conditions: Sequence[Mapping[str, Any]] = (status or {}).get("conditions") or []
    true_ones = [condition for condition in conditions if condition.get("status") == "True"]
    for kind, state in _FINAL.items():
        for condition in true_ones:
            if condition.get("type") == kind:
                return _job_status(state, condition)
    known = [condition for condition in true_ones if condition.get("type") in _PASSING]
    if not known:
        return JobStatus(JobState.PENDING)
    position, latest = max(enumerate(known), key=lambda item: (item[1].get("lastTransitionTime") or "", item[0]))
    return _job_status(_PASSING[known[position]["type"]], latest)


def _job_status(state: JobState, condition: Mapping[str, Any]) -> JobStatus:
    return JobStatus(state, condition.get("reason") or "", condition.get("message") or "")


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
    deadline_seconds: int | None
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


class PyTorchJobClient(CustomResourceClient[PyTorchJob]):
    """Reads and writes PyTorchJobs through injected API objects."""

    kind, group, version, plural = KIND, GROUP, VERSION, PLURAL
    missing_kind_advice = "install the Kubeflow training operator (v1) and its CRDs."
    forbidden_advice = "Give the service account the Role of docs/kubernetes.md, or check the namespace's quota."
    invalid_advice = "Correct the job's settings."

    def parse(self, body: Mapping[str, Any]) -> PyTorchJob:
        return _job(body)

    def set_labels(self, job: PyTorchJob, labels: Mapping[str, str]) -> PyTorchJob | None:
        """The job with some labels changed, or None when it is gone."""
        return self.patch(job, {"metadata": {"labels": dict(labels)}})

    def pods(self, namespace: str, name: str) -> list[Pod]:
        """Pods of the job of that name, the master first; also those that outlive a deleted job for a moment."""
        found = self._pods_with(f"{KIND} {namespace}/{name}", namespace, f"{OPERATOR_JOB_NAME_LABEL}={name}")
        return sorted((_pod(item) for item in found), key=lambda pod: (len(pod.replica), pod.replica))

    def owners_of_pods(self, namespace: str, label_selector: str) -> set[tuple[str, str | None]]:
        """Name of the job and id of the run of each pod with the given labels, whether or not the job still exists."""
        found = self._pods_with(f"{KIND}s with {label_selector}", namespace, label_selector)
        labels = [item.metadata.labels for item in found]
        return {
            (each[OPERATOR_JOB_NAME_LABEL], each.get(RUN_ID_LABEL))
            for each in labels
            if OPERATOR_JOB_NAME_LABEL in each
        }

    def delete_pod(self, namespace: str, pod: Pod, grace_seconds: int) -> None:
        """Ask a pod to end within the grace time, which may be shorter than the one it was made with."""
        options = k8s.V1DeleteOptions(
            grace_period_seconds=grace_seconds, preconditions=k8s.V1Preconditions(uid=pod.uid)
        )
        call = self._core.delete_namespaced_pod
        self._ask(f"delete pod {namespace}/{pod.name}", call, pod.name, namespace, body=options, none_on=(404, 409))


def _pod(item: Any) -> Pod:
    labels = item.metadata.labels or {}
    kind, index = labels.get(OPERATOR_REPLICA_TYPE_LABEL, "pod"), labels.get(OPERATOR_REPLICA_INDEX_LABEL, "0")
    return read_pod(item, f"{kind}-{index}")


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
        deadline_seconds=((body.get("spec") or {}).get("runPolicy") or {}).get("activeDeadlineSeconds"),
        status=read_status(body.get("status")),
    )
