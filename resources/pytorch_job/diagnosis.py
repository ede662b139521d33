"""Why a job failed, or will never start: from its condition, its pods as they were seen over time, and their logs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from resources.kubernetes.diagnosis import NOT_STARTED_REASONS, Cause, Obstacle, PodHistory
from resources.kubernetes.pods import ContainerExit, Pod
from resources.pytorch_job.status import JobStatus

_PERMANENT = (Cause.OUT_OF_MEMORY, Cause.NOT_STARTED, Cause.IMAGE, Cause.CONFIGURATION)

_ADVICE: Mapping[Cause, str] = {
    Cause.OUT_OF_MEMORY: "Raise `memory`, or let the process use less.",
    Cause.EXIT_CODE: "The last lines of its log say why.",
    Cause.KILLED: "The pod was ended from outside: deleted, preempted, or its node shut down. A retry starts it again.",
    Cause.NOT_STARTED: "Check `command` and the image's entry point.",
    Cause.EVICTED: "The node ran short of memory or disk. A retry starts it again; requests close to use prevent it.",
    Cause.DEADLINE: "Raise `run_policy.active_deadline_seconds`, or give the job less to do.",
    Cause.UNSCHEDULABLE: "Lower the requests, change node selector or tolerations, or add nodes.",
    Cause.IMAGE: "Check the image's name and tag, that the node can reach its registry, and `image_pull_secrets`.",
    Cause.CONFIGURATION: "Create the Secret, ConfigMap or volume that it names, in the job's namespace.",
    Cause.NO_PODS: "Check that the training operator runs, the namespace's quota, and the events of the job.",
    Cause.SLOW_START: "The node may still be pulling a large image: raise `start_timeout_seconds`.",
    Cause.OPERATOR_AWAY: "Check that the training operator runs. The job is left; the step's next attempt adopts it.",
    Cause.UNKNOWN: "Look at the job's pods and events with kubectl describe.",
}

_SIGKILL, _SIGTERM = 137, 143


@dataclass(frozen=True)
class Diagnosis:
    """The first thing that went wrong, what else was seen, and what to do."""

    job: str
    cause: Cause
    summary: str
    exit_code: int | None = None
    details: tuple[str, ...] = ()
    log_tails: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Last lines of the replica that failed, or of every replica where none stands out."""
    job_finished: bool = True
    """False when the job was given up and has to be removed."""

    @property
    def permanent(self) -> bool:
        """Whether the same job would end the same way again."""
        return self.cause in _PERMANENT

    def report(self) -> str:
        """All of it, as the text of an error."""
        lines = [f"{self.job} failed ({self.cause}): {self.summary}", f"What to do: {_ADVICE[self.cause]}"]
        lines += [f"- {detail}" for detail in self.details]
        for replica, tail in self.log_tails.items():
            lines.append(f"Last lines of {replica}:")
            lines += [f"    {line}" for line in tail]
        return "\n".join(lines)


def diagnose_failure(
    job: str, status: JobStatus, history: PodHistory, tails: Mapping[str, Sequence[str]], events: Sequence[str]
) -> Diagnosis:
    """Why the operator declared the job failed. `tails` are the last log lines of each replica."""
    failures = history.failures()
    details = [status.message] if status.message else []
    details += [_exit_line(end) for end in failures]
    details += [f"event {event}" for event in events[-5:]]
    first = failures[0] if failures else None
    evicted = history.evicted()
    if "longer than specified deadline" in status.message and not (first and first.out_of_memory):
        return Diagnosis(job, Cause.DEADLINE, status.message, None, tuple(details), dict(tails))
    if evicted and (first is None or first.exit_code in (_SIGKILL, _SIGTERM)):
        pod = evicted[0]
        return Diagnosis(
            job, Cause.EVICTED, f"{pod.replica} was evicted: {pod.message}", None, tuple(details), dict(tails)
        )
    if first:
        tail = {first.replica: tails[first.replica]} if tails.get(first.replica) else dict(tails)
        return Diagnosis(job, _exit_cause(first), _exit_line(first), first.exit_code, tuple(details), tail)
    return Diagnosis(job, Cause.UNKNOWN, status.message or "no reason given", None, tuple(details), dict(tails))


def diagnose_obstacle(
    job: str, obstacle: Obstacle, waited_seconds: float, pods: Sequence[Pod], events: Sequence[str]
) -> Diagnosis:
    """Why a job is given up before its pods ran, or though they ended."""
    summary = f"{obstacle} (for {waited_seconds:.0f} s)"
    details = [f"{pod.replica}: {pod.phase}" for pod in pods] + [f"event {event}" for event in events[-5:]]
    finished = obstacle.cause == Cause.OPERATOR_AWAY
    return Diagnosis(job, obstacle.cause, summary, details=tuple(details), job_finished=finished)


def _exit_cause(end: ContainerExit) -> Cause:
    if end.out_of_memory:
        return Cause.OUT_OF_MEMORY
    if end.reason in NOT_STARTED_REASONS:
        return Cause.NOT_STARTED
    return Cause.KILLED if end.exit_code in (_SIGKILL, _SIGTERM) else Cause.EXIT_CODE


def _exit_line(end: ContainerExit) -> str:
    words = ": ".join(part for part in (end.reason, end.message) if part)
    at = f" at {end.finished_at}" if end.finished_at else ""
    return f"{end.replica}/{end.container} ended with exit code {end.exit_code}{at}" + (f" ({words})" if words else "")
