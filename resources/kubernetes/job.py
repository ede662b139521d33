"""What kinds that run pods to an end have in common, such as PyTorchJob: exactly one for a step, watched, explained.

A kind adds a Job (how its status is read), a JobClient (which pods are its own, and what to advise) and a manifest;
`resources.kubernetes.pipes` makes a Pipes client of them. No Dagster here; clock and sleeper are given.
"""

import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Generic, TypeVar

from kubernetes import client as k8s

from resources.kubernetes.api import CustomResource, CustomResourceClient
from resources.kubernetes.diagnosis import (
    Cause,
    Diagnosis,
    Obstacle,
    Patience,
    PodHistory,
    WatchLimits,
    event_lines,
    exit_cause,
    exit_line,
    find_obstacle,
)
from resources.kubernetes.errors import ResourceConflictError, ResourceFailedError
from resources.kubernetes.launch import Launcher
from resources.kubernetes.naming import MANAGED_BY_LABEL, RUN_ID_LABEL, STEP_LABEL, selector, step_digest
from resources.kubernetes.pods import Pod, read_pod
from resources.kubernetes.watch import Watcher


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
    message: str = ""

    def __str__(self) -> str:
        return f"{self.state} ({self.message})" if self.message else str(self.state)


@dataclass(frozen=True)
class Job(CustomResource, ABC):
    """One stored object. A kind reads its status and deadline."""

    slug: ClassVar[str]
    """The kind in label values, annotation keys and metadata."""

    @property
    @abstractmethod
    def status(self) -> JobStatus: ...

    @property
    @abstractmethod
    def deadline_seconds(self) -> int | None: ...

    @property
    def finished(self) -> bool:
        return self.status.state.finished

    @property
    def run_id(self) -> str | None:
        return self.labels.get(RUN_ID_LABEL)

    @property
    def launch_id(self) -> str | None:
        """Id of the create call that made it; None for a job that this package did not make."""
        return self.annotations.get(self.launch_annotation())

    @property
    def work(self) -> str | None:
        """Digest of what it computes."""
        return self.annotations.get(self.work_annotation())

    @classmethod
    def managed_by(cls) -> str:
        """Value of the managed-by label of the jobs that this package makes."""
        return f"dagster-{cls.slug}"

    @classmethod
    def launch_annotation(cls) -> str:
        """Key of a create call's random id: the stored object shows whose call made it, and where its messages are."""
        return f"dagster/{cls.slug}-launch"

    @classmethod
    def work_annotation(cls) -> str:
        """Key of the digest of what the job computes: only a job with the same one may be adopted."""
        return f"dagster/{cls.slug}-work"


J = TypeVar("J", bound=Job)


class JobClient(CustomResourceClient[J], ABC, Generic[J]):
    """Adds the pods, which carry the job's name in `pod_label`."""

    pod_label: str
    advice: Mapping[Cause, str]
    """What to do about each cause of a failure."""

    @abstractmethod
    def replica_of(self, labels: Mapping[str, str]) -> str:
        """What people call a pod with these labels, such as worker-3."""

    def pods(self, namespace: str, name: str) -> list[Pod]:
        """Pods of the job of that name, master-0 first; also those that outlive a deleted job for a moment."""
        found = self._pods_with(f"{self.resource.kind} {namespace}/{name}", namespace, f"{self.pod_label}={name}")
        pods = [read_pod(item, self.replica_of(item.metadata.labels or {})) for item in found]
        return sorted(pods, key=lambda pod: (len(pod.replica), pod.replica))

    def owners_of_pods(self, namespace: str, label_selector: str) -> set[tuple[str, str | None]]:
        """Name of the job and id of the run of each pod with the given labels, whether or not the job still exists."""
        found = self._pods_with(f"{self.resource.kind}s with {label_selector}", namespace, label_selector)
        labels = [item.metadata.labels for item in found]
        return {(each[self.pod_label], each.get(RUN_ID_LABEL)) for each in labels if self.pod_label in each}

    def delete_pod(self, namespace: str, pod: Pod, grace_seconds: int) -> None:
        """Ask a pod to end within the grace time, which may be shorter than the one it was made with."""
        options = k8s.V1DeleteOptions(
            grace_period_seconds=grace_seconds, preconditions=k8s.V1Preconditions(uid=pod.uid)
        )
        call = self._core.delete_namespaced_pod
        self._ask(f"delete pod {namespace}/{pod.name}", call, pod.name, namespace, body=options, none_on=(404, 409))


@dataclass(frozen=True)
class JobRequest:
    """A job that a step wants, and whose earlier jobs count as its own."""

    job: type[Job]
    name: str
    namespace: str
    step_key: str
    run_id: str
    ancestor_run_ids: tuple[str, ...]
    """Runs that this one retries from failure, nearest first: their jobs may be adopted."""
    work: str
    """Digest of what the job computes."""
    launch_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def step_labels(self) -> dict[str, str]:
        """Of jobs and pods of this step in any run."""
        return {MANAGED_BY_LABEL: self.job.managed_by(), STEP_LABEL: step_digest(self.step_key)}

    @property
    def labels(self) -> dict[str, str]:
        return {**self.step_labels, RUN_ID_LABEL: self.run_id}

    @property
    def annotations(self) -> dict[str, str]:
        return {self.job.launch_annotation(): self.launch_id, self.job.work_annotation(): self.work}

    @property
    def run_ids(self) -> tuple[str, ...]:
        return (self.run_id, *self.ancestor_run_ids)

    def owns(self, job: Job) -> bool:
        """Whether the job was made for this step by this run or one that it retries."""
        return self.step_labels.items() <= job.labels.items() and job.run_id in self.run_ids

    def __str__(self) -> str:
        return f"{self.job.kind} {self.namespace}/{self.name}"


class JobLauncher(Launcher[JobRequest, J]):
    """Adopts, replaces, creates and removes the jobs of one step, found by their labels, and pods whose job is gone."""

    leftover_advice = "The collector sensor tries again; the job's deadline ends it in any case."

    def __init__(self, client: JobClient[J], **options: Any):
        super().__init__(client, **options)
        self._jobs = client
        self._cleared: set[str] = set()
        """Names of jobs whose pods have to go."""
        self._asked: set[str] = set()
        """Uids of pods that were asked to end."""

    def _own(self, request: JobRequest) -> Sequence[J]:
        found = self._jobs.find(request.namespace, selector(**request.step_labels))
        return [job for job in found if request.owns(job)]

    def _why_not(self, request: JobRequest, found: J) -> str | None:
        if found.deleting:
            return "it is being deleted"
        if found.status.state == JobState.FAILED:
            return f"it failed: {found.status.message}"
        return None if found.work == request.work else "it computes something else than this step asks for now"

    def _take_over(self, request: JobRequest, found: J) -> J | None:
        return self._jobs.patch(found, {"metadata": {"labels": {RUN_ID_LABEL: request.run_id}}})

    def _after_conflict(self, request: JobRequest) -> J | None:
        existing = self._jobs.get(request.namespace, request.name)
        if existing is None or existing.launch_id == request.launch_id:
            return existing  # deleted in between, or our own create call's, whose answer was lost
        if not request.owns(existing):
            raise ResourceConflictError(
                f"{existing} exists and is not this step's: it carries run id {existing.run_id!r}. "
                "Delete it, or use another name_prefix."
            )
        return None

    def _clear(self, request: JobRequest, own: Sequence[J], unwanted: Sequence[J], grace_seconds: int) -> list[str]:
        """Pods are deleted first, and their job at once after them, before its operator could make them again.

        The other way round, the garbage collector asks them with their own grace time, which a kubelet does not shorten
        later.
        """
        uids = {job.uid for job in unwanted}
        known = {job.name for job in own}
        owners = self._jobs.owners_of_pods(request.namespace, selector(**request.step_labels))
        orphaned = {name for name, run_id in owners if name not in known and run_id in request.run_ids}
        if orphaned - self._cleared:
            names = ", ".join(sorted(orphaned))
            self._log.warning("Removing pods of %ss that no longer exist: %s", self._jobs.resource.kind, names)
        self._cleared |= {job.name for job in unwanted} | orphaned
        left: list[str] = []
        for name in sorted(self._cleared):
            current = self._jobs.get(request.namespace, name)
            if current and current.uid not in uids:
                continue  # another's job, or one that is newer than the list
            for pod in self._jobs.pods(request.namespace, name):
                left.append(f"pod {pod.name}")
                if pod.uid not in self._asked:
                    self._asked.add(pod.uid)
                    self._jobs.delete_pod(request.namespace, pod, grace_seconds)
            if current:
                left.append(str(current))
                self._jobs.delete(current)
        return left


class JobWatcher(Watcher[J, WatchLimits]):
    """Watches one job to its end."""

    def __init__(self, client: JobClient[J], job: J, **options: Any):
        super().__init__(client, job, **options)
        self._jobs = client
        self._patience = Patience(self._limits, self._clock)
        self._cause: Cause | None = None
        self._active_since = self._clock()

    def wait_until_finished(self) -> J:
        """The succeeded job. ResourceFailedError, ResourceDeletedError, or ApiError after too long an outage."""
        job = super().wait_until_finished()
        if job.status.state == JobState.FAILED:
            raise ResourceFailedError(self._failure(job))
        return job

    def _report(self, current: J) -> str:
        if current.status.state != self._state:
            self._log.info("%s: %s", current, current.status)
        return str(current.status.state)

    def _pods_of(self, current: J) -> Sequence[Pod]:
        return self._jobs.pods(current.namespace, current.name)

    def _give_up_if_stuck(self, current: J, pods: Sequence[Pod] | None) -> None:
        if any(end.exit_code in self._limits.final_exit_codes for end in self._history.failures()):
            raise ResourceFailedError(self._failure(current, remove=True))
        suspended = current.status.state == JobState.SUSPENDED
        self._give_up_if_overdue(current, suspended)
        if pods is None:
            return
        obstacle = None if suspended else _obstacle(pods)
        waited = self._patience.spend(obstacle)
        if obstacle is None:
            self._cause = None
            return
        allowed = self._limits.of(obstacle.cause)
        if obstacle.cause != self._cause and obstacle.cause not in (Cause.SLOW_START, Cause.NO_PODS):
            left = max(0.0, allowed - waited)
            self._log.warning("%s waits: %s. It is given up after %.0f s.", current, obstacle, left)
        self._cause = obstacle.cause
        if waited >= allowed:
            details = (*(f"{pod.replica}: {pod.phase}" for pod in pods), *event_lines(self._events()))
            raise ResourceFailedError(
                Diagnosis(
                    obstacle.cause,
                    f"{obstacle} (for {waited:.0f} s)",
                    self._jobs.advice[obstacle.cause],
                    self._limits.is_worth_retrying(obstacle.cause),
                    str(current),
                    details=details,
                    remove=obstacle.cause != Cause.OPERATOR_AWAY,
                )
            )

    def _give_up_if_overdue(self, job: J, suspended: bool) -> None:
        """Give up what its own deadline should have ended, which the operator and the kubelet keep."""
        now = self._clock()
        if suspended:
            self._active_since = now
        waited, deadline = now - self._active_since, job.deadline_seconds
        if deadline is not None and waited >= deadline + self._limits.start_timeout_seconds:
            raise ResourceFailedError(
                Diagnosis(
                    Cause.DEADLINE,
                    f"still {job.status.state} after {waited:.0f} s, though its deadline is {deadline} s",
                    "Check that the operator runs: neither it nor the kubelet ended the job.",
                    transient=False,
                    subject=str(job),
                    remove=True,
                )
            )

    def _failure(self, job: J, *, remove: bool = False) -> Diagnosis:
        tails, events = self._logs.tails, self._events()
        return diagnose_failure(job, self._jobs.advice, self._history, tails, events, self._limits, remove=remove)

    def _events(self) -> list[str]:
        """Warnings of the job and of its pods."""
        names = [self._found.name, *(pod.name for pod in self._pods)]
        return [event for name in names for event in self._jobs.warnings(self._found.namespace, name)]


def diagnose_failure(
    job: Job,
    advice: Mapping[Cause, str],
    history: PodHistory,
    tails: Mapping[str, Sequence[str]],
    events: Sequence[str],
    limits: WatchLimits,
    *,
    remove: bool = False,
) -> Diagnosis:
    """Why the operator declared the job failed. `tails` are the last log lines of each replica."""
    message = job.status.message
    failures = history.failures()
    first = failures[0] if failures else None
    cause = exit_cause(first) if first else Cause.UNKNOWN
    evicted = history.evicted()
    if "longer than specified deadline" in message and cause != Cause.OUT_OF_MEMORY:
        first, cause, summary = None, Cause.DEADLINE, message
    elif evicted and cause in (Cause.KILLED, Cause.UNKNOWN):
        first, cause, summary = None, Cause.EVICTED, f"{evicted[0].replica} was evicted: {evicted[0].message}"
    else:
        summary = exit_line(first) if first else message or "no reason given"
    exit_code = first.exit_code if first else None
    return Diagnosis(
        cause,
        summary,
        advice[cause],
        limits.is_worth_retrying(cause, exit_code),
        str(job),
        exit_code,
        (*([message] if message else []), *map(exit_line, failures), *event_lines(events)),
        {first.replica: tails[first.replica]} if first and tails.get(first.replica) else dict(tails),
        remove,
    )


def _obstacle(pods: Sequence[Pod]) -> Obstacle | None:
    """What keeps the job from starting or from ending. `pods`: the one that decides about the job's end first."""
    if not pods:
        return Obstacle(Cause.NO_PODS, "job", "the operator has made no pod")
    ended = [pod for pod in pods if pod.phase == "Failed" or (pod is pods[0] and pod.finished)]
    found = find_obstacle(pods)
    if ended and found is None:
        text = f"it ended as {ended[0].phase}, and the operator has not recorded it"
        return Obstacle(Cause.OPERATOR_AWAY, ended[0].replica, text)
    return found
