"""The TrainJob custom resource of Kubeflow Trainer v2: its status, its pods, its Pipes client."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from resources.kubernetes.api import REQUEST_TIMEOUT_SECONDS, CustomResource, CustomResourceClient
from resources.kubernetes.collector import build_job_collector
from resources.kubernetes.job import Job, JobClient, JobState, JobStatus
from resources.kubernetes.naming import MANAGED_BY_LABEL
from resources.kubernetes.pipes import PipesJobClient
from resources.train_job.config import CONTAINER_NAME, TrainJobConfig
from resources.train_job.manifest import (
    GROUP,
    KIND,
    LONGEST_SUFFIX,
    PLURAL,
    VERSION,
    build_train_job_manifest,
)

JOBSET_NAME_LABEL = "jobset.sigs.k8s.io/jobset-name"
REPLICATED_JOB_LABEL = "jobset.sigs.k8s.io/replicatedjob-name"
INDEX_ANNOTATION = "batch.kubernetes.io/job-completion-index"


class TrainJob(Job):
    """A stored TrainJob."""

    kind, slug, longest_suffix = KIND, "train-job", LONGEST_SUFFIX
    deadline_words, expires = "exceeded its active deadline", False

    @property
    def status(self) -> JobStatus:
        return read_status(self.body.get("status"), suspended=bool(self._spec.get("suspend")))

    @property
    def progress(self) -> Sequence[str]:
        """Nothing while it is pending: its counts say so again between the end of its pods and its own end."""
        return () if self.status.state == JobState.PENDING else super().progress

    @property
    def deadline_seconds(self) -> int | None:
        return self._spec.get("activeDeadlineSeconds")

    @property
    def _spec(self) -> Mapping[str, Any]:
        return self.body.get("spec") or {}


class JobSet(CustomResource):
    """Created by Trainer for a TrainJob, with the same name. It owns the pods."""

    kind = "JobSet"


class JobSetClient(CustomResourceClient[JobSet]):
    """Reads and deletes JobSets through injected API objects."""

    resource = JobSet
    group, version, plural = "jobset.x-k8s.io", "v1alpha2", "jobsets"
    pod_label = JOBSET_NAME_LABEL
    operator = "JobSet"


class TrainJobClient(JobClient[TrainJob]):
    """Reads and writes TrainJobs, their JobSets and their pods through injected API objects."""

    resource = TrainJob
    group, version, plural = GROUP, VERSION, PLURAL
    pod_label = JOBSET_NAME_LABEL
    operator = "Kubeflow Trainer"

    def __init__(self, custom: Any, core: Any, request_timeout_seconds: float = REQUEST_TIMEOUT_SECONDS):
        super().__init__(custom, core, request_timeout_seconds)
        self.jobsets = JobSetClient(custom, core, request_timeout_seconds)

    def replica_of(self, pod: Any) -> str:
        name = (pod.metadata.labels or {}).get(REPLICATED_JOB_LABEL, CONTAINER_NAME)
        return f"{name}-{(pod.metadata.annotations or {}).get(INDEX_ANNOTATION, '0')}"

    def remove(self, namespace: str, name: str, job: TrainJob | None, grace_seconds: int) -> list[str]:
        """Also waits for the JobSet: Trainer would derive the status of the next TrainJob of that name from it."""
        left = super().remove(namespace, name, job, grace_seconds)
        jobset = self.jobsets.get(namespace, name)
        if jobset is None:
            return left
        if job is None and jobset.labels.get(MANAGED_BY_LABEL) == self.resource.managed_by():
            self.jobsets.delete(jobset)
        return [*left, str(jobset)]

    def event_names(self, job: TrainJob) -> Sequence[str]:
        """The TrainJob, its JobSet of the same name, and the Job that creates the pods."""
        return (job.name, f"{job.name}-{CONTAINER_NAME}-0")


class PipesTrainJobClient(PipesJobClient[TrainJobConfig]):
    """Runs a step's work as a TrainJob and waits for it. See PipesJobClient."""

    client_class = TrainJobClient
    build_manifest = staticmethod(build_train_job_manifest)


build_train_job_collector = functools.partial(build_job_collector, "train_job_collector")


def read_status(status: Mapping[str, Any] | None, *, suspended: bool = False) -> JobStatus:
    """State of a job from its `status`. `suspended` is spec.suspend, which counts before Trainer has recorded it.

    There is no condition for a running job, so its state is derived from the counts of child Jobs. All nodes are one
    child Job, which is ready once every node runs or has ended.
    """
    status = status or {}
    held = {each.get("type"): each for each in status.get("conditions") or () if each.get("status") == "True"}
    for kind, state in (("Failed", JobState.FAILED), ("Complete", JobState.SUCCEEDED)):
        if kind in held:
            return JobStatus(state, held[kind].get("message") or held[kind].get("reason") or "")
    if suspended or "Suspended" in held:
        return JobStatus(JobState.SUSPENDED)
    jobs: Sequence[Mapping[str, Any]] = status.get("jobsStatus") or ()
    running = any(each.get("ready") or each.get("succeeded") for each in jobs)
    return JobStatus(JobState.RUNNING if running else JobState.PENDING)
