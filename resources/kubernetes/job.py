"""The part that a kind which runs pods to completion adds to this package: its status, its pods, its failures.

`launch` and `watch` do the rest; `pipes` makes a Pipes client of it. No Dagster here.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Generic, TypeVar

from kubernetes import client as k8s

from resources.kubernetes.api import CustomResource, CustomResourceClient
from resources.kubernetes.diagnosis import (
    ADVICE,
    Cause,
    Diagnosis,
    Obstacle,
    PodHistory,
    WatchLimits,
    event_lines,
    exit_cause,
    exit_line,
    find_obstacle,
)
from resources.kubernetes.errors import KubernetesError, ResourceFailedError
from resources.kubernetes.naming import MANAGED_BY_LABEL, RUN_ID_LABEL, derive_name
from resources.kubernetes.pods import Pod


class JobState(StrEnum):
    """Phases of a job. The last two are final."""

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
    """State with the operator's message."""

    state: JobState
    message: str = ""

    def __str__(self) -> str:
        return f"{self.state} ({self.message})" if self.message else str(self.state)


@dataclass(frozen=True)
class Job(CustomResource, ABC):
    """A stored job. A kind defines its status and deadline."""

    slug: ClassVar[str]
    """The kind in label values, annotation keys and metadata."""
    longest_suffix: ClassVar[str]
    """The longest suffix that the operator appends to a job's name, for its pods and services."""
    deadline_words: ClassVar[str] = "longer than specified deadline"
    """Part of the message of a job that failed because its deadline has passed."""
    expires: ClassVar[bool] = True
    """Whether the cluster deletes a finished job after some time."""

    @property
    @abstractmethod
    def status(self) -> JobStatus: ...

    @property
    @abstractmethod
    def deadline_seconds(self) -> int | None: ...

    @property
    def progress(self) -> Sequence[str]:
        """What to log about its state if it changed since the last poll."""
        return (str(self.status),)

    @property
    def finished(self) -> bool:
        return self.status.state.finished

    @property
    def run_id(self) -> str | None:
        return self.labels.get(RUN_ID_LABEL)

    @property
    def launch_id(self) -> str | None:
        """Id of the create call that made it; None if this package did not make it."""
        return self.annotations.get(self.launch_annotation())

    @property
    def work(self) -> str | None:
        """Digest of the work it does."""
        return self.annotations.get(self.work_annotation())

    @classmethod
    def managed_by(cls) -> str:
        """Value of the managed-by label of the jobs that this package makes."""
        return f"dagster-{cls.slug}"

    @classmethod
    def launch_annotation(cls) -> str:
        """Key of the create call's random id, which also names the folder of the job's messages."""
        return f"dagster/{cls.slug}-launch"

    @classmethod
    def work_annotation(cls) -> str:
        """Key of the digest of what the job computes: only a job with the same one may be adopted."""
        return f"dagster/{cls.slug}-work"

    @classmethod
    def name_for(cls, prefix: str, *, run_id: str, step_key: str, attempt: int) -> str:
        """Name of the job for one attempt at a step of a Dagster run."""
        return derive_name(prefix, run_id, step_key, str(attempt), reserve=len(cls.longest_suffix))


J = TypeVar("J", bound=Job)


class JobClient(CustomResourceClient[J], Generic[J]):
    """Adds the removal of jobs with their pods, and the diagnosis of jobs that do not start, end or succeed."""

    def owners_of_pods(self, namespace: str, label_selector: str) -> set[tuple[str, str | None]]:
        """Name of the job and id of the run of each pod with the given labels, whether or not the job still exists."""
        labels = [pod.labels for pod in self.pods_with(namespace, label_selector)]
        return {(each[self.pod_label], each.get(RUN_ID_LABEL)) for each in labels if self.pod_label in each}

    def remove(self, namespace: str, name: str, job: J | None, grace_seconds: int) -> list[str]:
        """Delete the pods of the job with this name, then the job. Returns which of them still exist.

        If the job were deleted first, the garbage collector would delete the pods with their own grace period, which a
        kubelet does not shorten later. The job is deleted immediately after the pods, before its operator could
        recreate them.
        """
        pods = self.pods(namespace, name)
        if job is None:  # another owner's job with this name may have left pods too
            ours = self.resource.managed_by()
            return self.remove_pods(
                namespace, [pod for pod in pods if pod.labels.get(MANAGED_BY_LABEL) == ours], grace_seconds
            )
        left = self.remove_pods(namespace, pods, grace_seconds)
        self.delete(job)
        return [*left, str(job)]

    def remove_pods(self, namespace: str, pods: Sequence[Pod], grace_seconds: int) -> list[str]:
        """Delete pods with this grace period, which may be shorter than the one in their spec."""
        for pod in pods:
            if not pod.deleting:
                only_this = k8s.V1Preconditions(uid=pod.uid)
                options = k8s.V1DeleteOptions(grace_period_seconds=grace_seconds, preconditions=only_this)
                call, what = self._core.delete_namespaced_pod, f"delete pod {namespace}/{pod.name}"
                self._ask(what, call, pod.name, namespace, body=options, none_on=(404, 409))
        return [f"pod {pod.name}" for pod in pods]

    def obstacle(self, job: J, pods: Sequence[Pod]) -> Obstacle | None:
        """What keeps the job from starting, or from ending after its pods have ended; None if nothing does."""
        if job.status.state == JobState.SUSPENDED:
            return None
        if not pods:
            return Obstacle(Cause.NO_PODS, "job", "the operator has not created a pod")
        ended, found = self.ended(pods), find_obstacle(pods)
        if ended and found is None:
            text = f"it ended as {ended.phase}, and the operator has not recorded it"
            return Obstacle(Cause.OPERATOR_AWAY, ended.replica, text)
        return found

    def ended(self, pods: Sequence[Pod]) -> Pod | None:
        """A pod whose end should have ended the job: one that failed, or the first once all have finished."""
        failed = [pod for pod in pods if pod.phase == "Failed"]
        return failed[0] if failed else pods[0] if all(pod.finished for pod in pods) else None

    def advice(self, cause: Cause) -> str:
        """The advice for an obstacle."""
        return ADVICE[cause].format(operator=self.operator)

    def failure(
        self, job: J, history: PodHistory, tails: Mapping[str, Sequence[str]], limits: WatchLimits, *, remove: bool
    ) -> KubernetesError:
        """The error for a job that failed, or that was abandoned and has to be removed."""
        return ResourceFailedError(self.diagnose(job, history, tails, limits, remove=remove))

    def diagnose(
        self,
        job: J,
        history: PodHistory,
        tails: Mapping[str, Sequence[str]],
        limits: WatchLimits,
        *,
        remove: bool = False,
    ) -> Diagnosis:
        """Why the operator declared the job failed. `tails` are the last log lines of each replica."""
        message = job.status.message
        failures, evicted = history.failures(), history.evicted()
        first = failures[0] if failures else None
        cause = exit_cause(first) if first else Cause.UNKNOWN
        if job.deadline_words in message and cause != Cause.OUT_OF_MEMORY:
            first, cause, summary = None, Cause.DEADLINE, message
        elif evicted and cause in (Cause.KILLED, Cause.UNKNOWN):
            first, cause, summary = None, Cause.EVICTED, f"{evicted[0].replica} was evicted: {evicted[0].message}"
        else:
            summary = exit_line(first) if first else message or "no reason given"
        exit_code = first.exit_code if first else None
        events = event_lines(self.events(job, history.pods.values()))
        return Diagnosis(
            cause=cause,
            summary=summary,
            advice=self.advice(cause),
            transient=limits.is_worth_retrying(cause, exit_code),
            subject=str(job),
            exit_code=exit_code,
            details=(*([message] if message else []), *map(exit_line, failures), *events),
            log_tails={first.replica: tails[first.replica]} if first and tails.get(first.replica) else dict(tails),
            remove=remove,
        )

    def events(self, job: J, pods: Any) -> list[str]:
        """Warnings about the job and its pods."""
        names = [*self.event_names(job), *(pod.name for pod in pods)]
        return [event for name in names for event in self.warnings(job.namespace, name)]

    def event_names(self, job: J) -> Sequence[str]:
        """Names of the objects whose events concern the job, except its pods."""
        return (job.name,)
