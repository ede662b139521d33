"""Why a job failed, or will never start: from its condition, its pods as they were seen over time, and their logs."""

from collections.abc import Mapping, Sequence

from resources.kubernetes.diagnosis import (
    Cause,
    Diagnosis,
    Obstacle,
    PodHistory,
    WatchLimits,
    event_lines,
    exit_cause,
    exit_line,
)
from resources.kubernetes.pods import Pod
from resources.pytorch_job.client import JobStatus

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


def diagnose_failure(
    job: str,
    status: JobStatus,
    history: PodHistory,
    tails: Mapping[str, Sequence[str]],
    events: Sequence[str],
    limits: WatchLimits,
    *,
    remove: bool = False,
) -> Diagnosis:
    """Why the operator declared the job failed. `tails` are the last log lines of each replica."""
    failures = history.failures()
    first = failures[0] if failures else None
    cause = exit_cause(first) if first else Cause.UNKNOWN
    evicted = history.evicted()
    if "longer than specified deadline" in status.message and cause != Cause.OUT_OF_MEMORY:
        first, cause, summary = None, Cause.DEADLINE, status.message
    elif evicted and cause in (Cause.KILLED, Cause.UNKNOWN):
        first, cause, summary = None, Cause.EVICTED, f"{evicted[0].replica} was evicted: {evicted[0].message}"
    else:
        summary = exit_line(first) if first else status.message or "no reason given"
    exit_code = first.exit_code if first else None
    return Diagnosis(
        cause,
        summary,
        _ADVICE[cause],
        limits.is_worth_retrying(cause, exit_code),
        job,
        exit_code,
        (*([status.message] if status.message else []), *map(exit_line, failures), *event_lines(events)),
        {first.replica: tails[first.replica]} if first and tails.get(first.replica) else dict(tails),
        remove,
    )


def diagnose_obstacle(
    job: str,
    obstacle: Obstacle,
    waited_seconds: float,
    pods: Sequence[Pod],
    events: Sequence[str],
    limits: WatchLimits,
) -> Diagnosis:
    """Why a job is given up before its pods ran, or though they ended."""
    return Diagnosis(
        obstacle.cause,
        f"{obstacle} (for {waited_seconds:.0f} s)",
        _ADVICE[obstacle.cause],
        limits.is_worth_retrying(obstacle.cause),
        job,
        details=(*(f"{pod.replica}: {pod.phase}" for pod in pods), *event_lines(events)),
        remove=obstacle.cause != Cause.OPERATOR_AWAY,
    )


def diagnose_overdue(job: str, status: JobStatus, waited_seconds: float, deadline_seconds: float) -> Diagnosis:
    """Why a job is given up that nobody ended at its deadline."""
    return Diagnosis(
        Cause.DEADLINE,
        f"still {status.state} after {waited_seconds:.0f} s, though its deadline is {deadline_seconds} s",
        "Check that the training operator runs: neither it nor the kubelet ended the job.",
        transient=False,
        subject=job,
        remove=True,
    )
