"""The PyTorchJob custom resource of Kubeflow's training operator: how its status is read, its pods, and advice."""

from collections.abc import Mapping, Sequence
from typing import Any

from resources.kubernetes.diagnosis import Cause
from resources.kubernetes.job import Job, JobClient, JobState, JobStatus
from resources.pytorch_job.manifest import GROUP, KIND, PLURAL, VERSION

OPERATOR_JOB_NAME_LABEL = "training.kubeflow.org/job-name"
OPERATOR_REPLICA_TYPE_LABEL = "training.kubeflow.org/replica-type"
OPERATOR_REPLICA_INDEX_LABEL = "training.kubeflow.org/replica-index"

_FINAL = {"Failed": JobState.FAILED, "Succeeded": JobState.SUCCEEDED}
_PASSING = {
    "Suspended": JobState.SUSPENDED,
    "Running": JobState.RUNNING,
    "Restarting": JobState.RESTARTING,
    "Created": JobState.PENDING,
}


class PyTorchJob(Job):
    """One stored PyTorchJob."""

    kind, slug = KIND, "pytorch-job"

    @property
    def status(self) -> JobStatus:
        return read_status(self.body.get("status"))

    @property
    def deadline_seconds(self) -> int | None:
        return ((self.body.get("spec") or {}).get("runPolicy") or {}).get("activeDeadlineSeconds")


class PyTorchJobClient(JobClient[PyTorchJob]):
    """Reads and writes PyTorchJobs and their pods through injected API objects."""

    resource = PyTorchJob
    group, version, plural = GROUP, VERSION, PLURAL
    pod_label = OPERATOR_JOB_NAME_LABEL
    missing_kind_advice = "install the Kubeflow training operator (v1) and its CRDs."
    forbidden_advice = "Give the service account the Role of docs/kubernetes.md, or check the namespace's quota."
    invalid_advice = "Correct the job's settings."
    advice: Mapping[Cause, str] = {
        Cause.OUT_OF_MEMORY: "Raise `memory`, or let the process use less.",
        Cause.EXIT_CODE: "The last lines of its log say why.",
        Cause.KILLED: "The pod was ended from outside: deleted, preempted, or its node shut down. Retry the step.",
        Cause.NOT_STARTED: "Check `command` and the image's entry point.",
        Cause.EVICTED: "The node ran short of memory or disk. Retry the step, with requests closer to use.",
        Cause.DEADLINE: "Raise `run_policy.active_deadline_seconds`, or give the job less to do.",
        Cause.UNSCHEDULABLE: "Lower the requests, change node selector or tolerations, or add nodes.",
        Cause.IMAGE: "Check the image's name and tag, that the node can reach its registry, and `image_pull_secrets`.",
        Cause.CONFIGURATION: "Create the Secret, ConfigMap or volume that it names, in the job's namespace.",
        Cause.NO_PODS: "Check that the training operator runs, the namespace's quota, and the events of the job.",
        Cause.SLOW_START: "The node may still be pulling a large image: raise `start_timeout_seconds`.",
        Cause.OPERATOR_AWAY: "Check that the training operator runs. The job is kept: the next attempt adopts it.",
        Cause.UNKNOWN: "Look at the job's pods and events with kubectl describe.",
    }

    def replica_of(self, labels: Mapping[str, str]) -> str:
        kind, index = labels.get(OPERATOR_REPLICA_TYPE_LABEL, "pod"), labels.get(OPERATOR_REPLICA_INDEX_LABEL, "0")
        return f"{kind}-{index}"


def read_status(status: Mapping[str, Any] | None) -> JobStatus:
    """State of a job from its `status`, which the operator fills only some time after the job exists.

    A final condition decides, wherever it stands in the list: the operator leaves an older Running one true beside it.
    Failed wins over Succeeded, as the operator writes it last when a job exceeds a limit while it ends. Otherwise the
    condition that changed last decides; conditions that are no longer true do not count.
    """
    conditions: Sequence[Mapping[str, Any]] = (status or {}).get("conditions") or []
    held = [condition for condition in conditions if condition.get("status") == "True"]
    for kind, state in _FINAL.items():
        for condition in held:
            if condition.get("type") == kind:
                return JobStatus(state, condition.get("message") or "")
    known = [condition for condition in held if condition.get("type") in _PASSING]
    if not known:
        return JobStatus(JobState.PENDING)
    _, latest = max(enumerate(known), key=lambda item: (item[1].get("lastTransitionTime") or "", item[0]))
    return JobStatus(_PASSING[latest["type"]], latest.get("message") or "")
