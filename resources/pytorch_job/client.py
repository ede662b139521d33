"""The PyTorchJob custom resource of Kubeflow's training operator: its status, its pods, its Pipes client."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from resources.kubernetes.collector import build_job_collector
from resources.kubernetes.job import Job, JobClient, JobState, JobStatus
from resources.kubernetes.pipes import PipesJobClient
from resources.kubernetes.pods import Pod
from resources.pytorch_job.config import PyTorchJobConfig
from resources.pytorch_job.manifest import (
    GROUP,
    KIND,
    LONGEST_SUFFIX,
    PLURAL,
    VERSION,
    build_pytorch_job_manifest,
)

OPERATOR_JOB_NAME_LABEL = "training.kubeflow.org/job-name"
_REPLICA_TYPE_LABEL = "training.kubeflow.org/replica-type"
_REPLICA_INDEX_LABEL = "training.kubeflow.org/replica-index"

_FINAL = {"Failed": JobState.FAILED, "Succeeded": JobState.SUCCEEDED}
_PASSING = {
    "Suspended": JobState.SUSPENDED,
    "Running": JobState.RUNNING,
    "Restarting": JobState.RESTARTING,
    "Created": JobState.PENDING,
}


class PyTorchJob(Job):
    """A stored PyTorchJob."""

    kind, slug, longest_suffix = KIND, "pytorch-job", LONGEST_SUFFIX

    @property
    def status(self) -> JobStatus:
        return read_status(self.body.get("status"), suspended=bool(self._run_policy.get("suspend")))

    @property
    def deadline_seconds(self) -> int | None:
        return self._run_policy.get("activeDeadlineSeconds")

    @property
    def _run_policy(self) -> Mapping[str, Any]:
        return (self.body.get("spec") or {}).get("runPolicy") or {}


class PyTorchJobClient(JobClient[PyTorchJob]):
    """Reads and writes PyTorchJobs and their pods through injected API objects."""

    resource = PyTorchJob
    group, version, plural = GROUP, VERSION, PLURAL
    pod_label = OPERATOR_JOB_NAME_LABEL
    operator = "the Kubeflow training operator"

    def replica_of(self, pod: Any) -> str:
        labels = pod.metadata.labels or {}
        return f"{labels.get(_REPLICA_TYPE_LABEL, 'pod')}-{labels.get(_REPLICA_INDEX_LABEL, '0')}"

    def ended(self, pods: Sequence[Pod]) -> Pod | None:
        """The job ends when its master, the first pod, ends."""
        return pods[0] if pods and pods[0].finished else super().ended(pods)


class PipesPyTorchJobClient(PipesJobClient[PyTorchJobConfig]):
    """Runs a step's work as a PyTorchJob and waits for it. See PipesJobClient."""

    client_class = PyTorchJobClient
    build_manifest = staticmethod(build_pytorch_job_manifest)


build_pytorch_job_collector = functools.partial(build_job_collector, "pytorch_job_collector")


def read_status(status: Mapping[str, Any] | None, *, suspended: bool = False) -> JobStatus:
    """State of a job from its `status`, which the operator fills only some time after the job is created.

    A final condition decides, wherever it is in the list: the operator leaves an older Running condition true beside
    it. Failed wins over Succeeded, because the operator writes it last if a job exceeds a limit while it ends.
    Otherwise the condition that changed last decides; conditions that are no longer true do not count. `suspended` is
    spec.runPolicy.suspend, which counts before the operator has recorded it.
    """
    conditions: Sequence[Mapping[str, Any]] = (status or {}).get("conditions") or []
    held = [condition for condition in conditions if condition.get("status") == "True"]
    for kind, state in _FINAL.items():
        for condition in held:
            if condition.get("type") == kind:
                return JobStatus(state, condition.get("message") or "")
    if suspended:
        return JobStatus(JobState.SUSPENDED)
    known = [condition for condition in held if condition.get("type") in _PASSING]
    if not known:
        return JobStatus(JobState.PENDING)
    _, latest = max(enumerate(known), key=lambda item: (item[1].get("lastTransitionTime") or "", item[0]))
    return JobStatus(_PASSING[latest["type"]], latest.get("message") or "")
