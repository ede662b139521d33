"""Diagnoses why something failed or does not start, from the observed state of its pods over time."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from resources.kubernetes.errors import KubernetesError
from resources.kubernetes.pods import ContainerExit, Pod


class Cause(StrEnum):
    """Kinds of failure, each with its own advice."""

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
    Cause.OUT_OF_MEMORY: "Raise `memory`, or make the process use less.",
    Cause.EXIT_CODE: "See the last lines of its log.",
    Cause.KILLED: "The pod was deleted or preempted, its node shut down, or its process requests a restart: "
    "see the last lines of its log. Retry the step.",
    Cause.NOT_STARTED: "Check `command` and the image's entry point.",
    Cause.EVICTED: "The node ran short of memory or disk. Retry the step, with requests closer to actual use.",
    Cause.DEADLINE: "Raise `active_deadline_seconds`, or reduce the work of the job.",
    Cause.UNSCHEDULABLE: "Lower the requests, change node selector or tolerations, or add nodes.",
    Cause.IMAGE: "Check the image's name and tag, that the node can reach its registry, and `image_pull_secrets`.",
    Cause.CONFIGURATION: "Create the Secret, ConfigMap or volume that the message names, in the job's namespace.",
    Cause.NO_PODS: "Check that {operator} is running, the namespace's quota, and the events of the job.",
    Cause.SLOW_START: "The node may still be pulling a large image: raise `start_timeout_seconds`.",
    Cause.OPERATOR_AWAY: "Check that {operator} is running. The job is kept: the next attempt adopts it.",
    Cause.UNKNOWN: "Look at the job's pods and events with kubectl describe.",
}
"""Advice for each cause, for a kind managed by `operator`."""

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
    """The first failure, further observations, and what to do."""

    cause: str
    """A Cause, or a cause specific to the kind."""
    summary: str
    advice: str
    transient: bool
    """Whether a retry may help."""
    subject: str = ""
    """The object, if the message does not name it."""
    exit_code: int | None = None
    details: tuple[str, ...] = ()
    log_tails: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Last log lines of the failed pod, or of every pod if the failed one is unknown."""
    remove: bool = False
    """The object was abandoned and has to be removed."""

    def report(self) -> str:
        """The complete text of the error."""
        head = f"{self.subject} failed ({self.cause}): " if self.subject else f"({self.cause}) "
        lines = [head + self.summary, f"What to do: {self.advice}", *(f"- {detail}" for detail in self.details)]
        for where, tail in self.log_tails.items():
            lines += [f"Last lines of {where}:", *(f"    {line}" for line in tail)]
        return "\n".join(lines)


def exit_cause(end: ContainerExit) -> Cause:
    """The cause that a failed container's exit indicates."""
    if end.out_of_memory:
        return Cause.OUT_OF_MEMORY
    if end.reason in NOT_STARTED_REASONS:
        return Cause.NOT_STARTED
    return Cause.KILLED if end.exit_code in (_SIGKILL, _SIGTERM) else Cause.EXIT_CODE


def exit_line(end: ContainerExit) -> str:
    """Describes one exit of a container."""
    words = ": ".join(part for part in (end.reason, end.message) if part and part != "Error")
    return f"{end.replica}/{end.container} ended with exit code {end.exit_code}" + (f" ({words})" if words else "")


def event_lines(events: Sequence[str]) -> tuple[str, ...]:
    """The newest warnings, as details of a diagnosis."""
    return tuple(f"event {event}" for event in events[-5:])


class PodHistory:
    """The observed pods and container exits, kept after the pods are deleted."""

    def __init__(self) -> None:
        self.pods: dict[str, Pod] = {}
        self._exits: dict[tuple[str, str, str, int], ContainerExit] = {}
        self._forgotten: set[str] = set()

    def observe(self, pods: Iterable[Pod]) -> None:
        for pod in pods:
            if pod.uid in self._forgotten:
                continue
            self.pods[pod.uid] = pod
            for container in pod.containers:
                for end in container.exits:
                    self._exits[(pod.uid, container.name, end.finished_at, end.exit_code)] = end

    def forget(self, pods: Iterable[Pod]) -> None:
        """Drop everything observed so far, and ignore these pods and those seen before from now on."""
        self._forgotten |= self.pods.keys() | {pod.uid for pod in pods}
        self.pods.clear()
        self._exits.clear()

    def failures(self) -> list[ContainerExit]:
        """Exits with a code other than 0, oldest first."""
        return sorted((end for end in self._exits.values() if end.failed), key=lambda end: end.finished_at)

    def evicted(self) -> list[Pod]:
        return [pod for pod in self.pods.values() if pod.reason == "Evicted"]


@dataclass(frozen=True)
class Obstacle:
    """What currently keeps a pod from starting."""

    cause: Cause
    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


def find_obstacle(pods: Sequence[Pod]) -> Obstacle | None:
    """The first reason why not every pod has started; None if all have."""
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
"""Causes that may go away without a change. A deadline is not one of them: it limits the work itself."""


@dataclass(frozen=True)
class WatchLimits:
    """Polling interval, and how long to wait for pods that do not start or an API that does not respond."""

    poll_interval_seconds: float = 2.0
    unschedulable_timeout_seconds: float = 600.0
    """Limit if no node fits. Long enough for an autoscaler to add one."""
    blocked_timeout_seconds: float = 120.0
    """Limit if the image cannot be pulled, or a Secret or ConfigMap is missing."""
    start_timeout_seconds: float = 1800.0
    """Limit if a pod is not running without an error, such as while a large image is pulled or the operator is down.
    Also how long after its deadline a job may still be active."""
    outage_timeout_seconds: float = 600.0
    """Limit if the API server does not respond."""
    final_exit_codes: tuple[int, ...] = ()
    """Exit codes after which a restart cannot help: the job is abandoned at the first one."""
    retry_other_exit_codes: bool = True
    """Whether another attempt may help after the other codes, except those of a process that got SIGKILL or SIGTERM."""
    calm_seconds: float = 600.0
    """How long all pods have to run before earlier start problems are forgotten."""

    def is_worth_retrying(self, cause: Cause, exit_code: int | None = None) -> bool:
        """Whether another attempt at the same work may help. Used for errors and for Dagster's retries."""
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
    """Sums up how long each cause has kept pods from starting.

    A cause that goes away and comes back, or alternates with another, does not start from zero again.
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
        """Total seconds for which the obstacle's cause has been seen; 0 if there is no obstacle."""
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


@dataclass
class Outage:
    """Tolerates errors until they have lasted too long. `meanwhile` is logged to say what they mean for the work."""

    clock: Callable[[], float]
    limit_seconds: float
    logger: logging.Logger
    meanwhile: str
    _since: float | None = None

    def endure(self, error: KubernetesError) -> None:
        """Record a failed call. Raises its error when the outage has lasted for the limit."""
        now = self.clock()
        if self._since is None:
            self._since = now
            self.logger.warning("No usable response from the API server; %s: %s", self.meanwhile, error)
        if now - self._since >= self.limit_seconds:
            raise error

    def end(self) -> None:
        """Record a successful call."""
        if self._since is not None:
            self.logger.info("The API server responds again.")
        self._since = None
