"""Why something failed or does not start: from the state of its pods as it was seen over time."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from resources.kubernetes.errors import KubernetesError
from resources.kubernetes.pods import ContainerExit, Pod


class Cause(StrEnum):
    """Kinds of failure, each with its own remedy."""

    OUT_OF_MEMORY = "out of memory"
    EXIT_CODE = "exit code"
    KILLED = "killed"
    NOT_STARTED = "container could not start"
    EVICTED = "evicted"
    DEADLINE = "deadline exceeded"
    UNSCHEDULABLE = "unschedulable"
    IMAGE = "image not pulled"
    CONFIGURATION = "pod configuration"
    NO_PODS = "no pods"
    SLOW_START = "slow start"
    OPERATOR_AWAY = "operator away"
    UNKNOWN = "unknown"


ADVICE: Mapping[Cause, str] = {
    Cause.OUT_OF_MEMORY: "Raise `memory`, or let the process use less.",
    Cause.EXIT_CODE: "The last lines of its log say why.",
    Cause.KILLED: "The pod was deleted or preempted, its node shut down, or its process asks to be started again: "
    "the last lines of its log say which. Retry the step.",
    Cause.NOT_STARTED: "Check `command` and the image's entry point.",
    Cause.EVICTED: "The node ran short of memory or disk. Retry the step, with requests closer to use.",
    Cause.DEADLINE: "Raise `active_deadline_seconds`, or give the job less to do.",
    Cause.UNSCHEDULABLE: "Lower the requests, change node selector or tolerations, or add nodes.",
    Cause.IMAGE: "Check the image's name and tag, that the node can reach its registry, and `image_pull_secrets`.",
    Cause.CONFIGURATION: "Create the Secret, ConfigMap or volume that it names, in the job's namespace.",
    Cause.NO_PODS: "Check that {operator} runs, the namespace's quota, and the events of the job.",
    Cause.SLOW_START: "The node may still be pulling a large image: raise `start_timeout_seconds`.",
    Cause.OPERATOR_AWAY: "Check that {operator} runs. The job is kept: the next attempt adopts it.",
    Cause.UNKNOWN: "Look at the job's pods and events with kubectl describe.",
}
"""What to do about each cause, where `operator` looks after the kind."""

NOT_STARTED_REASONS = ("RunContainerError", "StartError", "ContainerCannotRun")
_WAITING_CAUSES: Mapping[str, Cause] = {
    **dict.fromkeys(NOT_STARTED_REASONS, Cause.NOT_STARTED),
    **dict.fromkeys(
        ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError"), Cause.IMAGE
    ),
    **dict.fromkeys(("CreateContainerConfigError", "CreateContainerError"), Cause.CONFIGURATION),
}
_SIGKILL, _SIGTERM = 137, 143


@dataclass(frozen=True)
class Diagnosis:
    """The first thing that went wrong, what else was seen, and what to do."""

    cause: str
    """A Cause, or a word of the kind's own."""
    summary: str
    advice: str
    transient: bool
    """Whether trying again may help."""
    subject: str = ""
    """The object, where the message does not name it otherwise."""
    exit_code: int | None = None
    details: tuple[str, ...] = ()
    log_tails: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Last lines of the pod that failed, or of every pod where none stands out."""
    remove: bool = False
    """The object was given up and has to be removed."""

    def report(self) -> str:
        """All of it, as the text of an error."""
        head = f"{self.subject} failed ({self.cause}): " if self.subject else f"({self.cause}) "
        lines = [head + self.summary, f"What to do: {self.advice}", *(f"- {detail}" for detail in self.details)]
        for where, tail in self.log_tails.items():
            lines += [f"Last lines of {where}:", *(f"    {line}" for line in tail)]
        return "\n".join(lines)


def exit_cause(end: ContainerExit) -> Cause:
    """What the end of a container that failed means."""
    if end.out_of_memory:
        return Cause.OUT_OF_MEMORY
    if end.reason in NOT_STARTED_REASONS:
        return Cause.NOT_STARTED
    return Cause.KILLED if end.exit_code in (_SIGKILL, _SIGTERM) else Cause.EXIT_CODE


def exit_line(end: ContainerExit) -> str:
    """One end of a container, for a person to read."""
    words = ": ".join(part for part in (end.reason, end.message) if part and part != "Error")
    return f"{end.replica}/{end.container} ended with exit code {end.exit_code}" + (f" ({words})" if words else "")


def event_lines(events: Sequence[str]) -> tuple[str, ...]:
    """The newest warnings, as details of a diagnosis."""
    return tuple(f"event {event}" for event in events[-5:])


class PodHistory:
    """Pods and container exits as they were seen, kept after the pods are deleted."""

    def __init__(self) -> None:
        self.pods: dict[str, Pod] = {}
        self._exits: dict[tuple[str, str, str, int], ContainerExit] = {}

    def observe(self, pods: Iterable[Pod]) -> None:
        for pod in pods:
            self.pods[pod.uid] = pod
            for container in pod.containers:
                for end in container.exits:
                    self._exits[(pod.uid, container.name, end.finished_at, end.exit_code)] = end

    def failures(self) -> list[ContainerExit]:
        """Exits with another code than 0, the first one first."""
        return sorted((end for end in self._exits.values() if end.failed), key=lambda end: end.finished_at)

    def evicted(self) -> list[Pod]:
        return [pod for pod in self.pods.values() if pod.reason == "Evicted"]


@dataclass(frozen=True)
class Obstacle:
    """What keeps a pod from starting, now."""

    cause: Cause
    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


def find_obstacle(pods: Sequence[Pod]) -> Obstacle | None:
    """The first reason for which not every pod has started; None when all have."""
    pending = [pod for pod in pods if pod.phase == "Pending" and not pod.deleting]
    found = [_obstacle(pod) for pod in pending]
    order = list(Cause)
    return min(found, key=lambda obstacle: order.index(obstacle.cause), default=None)


def _obstacle(pod: Pod) -> Obstacle:
    if pod.unschedulable:
        return Obstacle(Cause.UNSCHEDULABLE, pod.replica, pod.unschedulable)
    for container in pod.containers:
        cause = _WAITING_CAUSES.get(container.waiting_reason)
        if cause:
            text = f"{container.waiting_reason}: {container.waiting_message}".removesuffix(": ")
            return Obstacle(cause, f"{pod.replica}/{container.name}", text)
    waiting = ", ".join(sorted({c.waiting_reason for c in pod.containers if c.waiting_reason})) or "waiting"
    return Obstacle(Cause.SLOW_START, pod.replica, waiting)


_TRANSIENT_CAUSES = (
    Cause.KILLED,
    Cause.EVICTED,
    Cause.UNSCHEDULABLE,
    Cause.NO_PODS,
    Cause.SLOW_START,
    Cause.OPERATOR_AWAY,
    Cause.UNKNOWN,
)
"""Those that may go away by themselves. A deadline is not one of them: it says how long the work may take."""


@dataclass(frozen=True)
class WatchLimits:
    """How often to look, and how long to wait for pods that do not start or an API that does not answer."""

    poll_interval_seconds: float = 2.0
    unschedulable_timeout_seconds: float = 600.0
    """No node fits. Long enough for an autoscaler to add one."""
    blocked_timeout_seconds: float = 120.0
    """The image cannot be pulled, or a Secret or ConfigMap is missing."""
    start_timeout_seconds: float = 1800.0
    """Nothing is wrong but a pod is not running: a large image is being pulled. Also how long an operator may be away,
    and how long after its deadline a job may still be active."""
    outage_timeout_seconds: float = 600.0
    """No answer from the API server."""
    final_exit_codes: tuple[int, ...] = ()
    """Exit codes after which a restart cannot help: the work is given up at the first one."""
    retry_other_exit_codes: bool = True
    """Whether another attempt may help after the others, except those of a process that got SIGKILL or SIGTERM."""
    calm_seconds: float = 600.0
    """How long all pods have to run before what kept them from starting earlier is forgotten."""

    def is_worth_retrying(self, cause: Cause, exit_code: int | None = None) -> bool:
        """Whether another attempt at the same work may help. Errors carry this answer, and Dagster's retries."""
        if cause == Cause.EXIT_CODE:
            return self.retry_other_exit_codes and exit_code not in self.final_exit_codes
        return cause in _TRANSIENT_CAUSES

    def of(self, cause: Cause) -> float:
        if cause == Cause.UNSCHEDULABLE:
            return self.unschedulable_timeout_seconds
        if cause in (Cause.IMAGE, Cause.CONFIGURATION, Cause.NOT_STARTED):
            return self.blocked_timeout_seconds
        return self.start_timeout_seconds


class Patience:
    """Adds up how long each cause has kept pods from starting.

    A cause that goes away and comes back, or alternates with another, does not start from zero each time.
    """

    def __init__(self, limits: WatchLimits, clock: Callable[[], float]):
        self._limits = limits
        self._clock = clock
        self._spent: dict[Cause, float] = {}
        self._calm = 0.0
        self.cause: Cause | None = None
        """What was in the way at the last look."""
        self._seen_at = clock()

    def spend(self, obstacle: Obstacle | None) -> float:
        """Seconds for which the obstacle's cause has been seen so far; 0 when nothing is in the way."""
        now = self._clock()
        passed, self._seen_at = now - self._seen_at, now
        if self.cause:
            self._spent[self.cause] = self._spent.get(self.cause, 0.0) + passed
            self._calm = 0.0
        else:
            self._calm += passed
            if self._calm >= self._limits.calm_seconds:
                self._spent.clear()
        self.cause = obstacle.cause if obstacle else None
        return self._spent.get(self.cause, 0.0) if self.cause else 0.0


class Outage:
    """Tolerates errors until they have lasted too long. `meanwhile` says in the log what they mean for the work."""

    def __init__(self, clock: Callable[[], float], limit_seconds: float, *, logger: logging.Logger, meanwhile: str):
        self._clock = clock
        self._limit_seconds = limit_seconds
        self._log = logger
        self._meanwhile = meanwhile
        self._since: float | None = None

    def endure(self, error: KubernetesError) -> None:
        """Record one call without a usable answer. Raises it once that has lasted for the limit."""
        now = self._clock()
        if self._since is None:
            self._since = now
            self._log.warning("No usable answer from the API server; %s: %s", self._meanwhile, error)
        if now - self._since >= self._limit_seconds:
            raise error

    def end(self) -> None:
        """Record an answer."""
        if self._since is not None:
            self._log.info("The API server answers as before.")
        self._since = None
