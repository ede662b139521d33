"""Why something failed or does not start: from the state of its pods as it was seen over time. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from resources.kubernetes.pods import Container, ContainerExit, Pod


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


_IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError")
_CONFIGURATION_REASONS = ("CreateContainerConfigError", "CreateContainerError")
_SIGKILL, _SIGTERM = 137, 143
NOT_STARTED_REASONS = ("RunContainerError", "StartError", "ContainerCannotRun", "CreateContainerError")


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
    """The object, where the reader is not told otherwise."""
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
        cause = _waiting_cause(container)
        if cause:
            text = f"{container.waiting_reason}: {container.waiting_message}".removesuffix(": ")
            return Obstacle(cause, f"{pod.replica}/{container.name}", text)
    waiting = ", ".join(sorted({c.waiting_reason for c in pod.containers if c.waiting_reason})) or "waiting"
    return Obstacle(Cause.SLOW_START, pod.replica, waiting)


def _waiting_cause(container: Container) -> Cause | None:
    if container.waiting_reason in _IMAGE_REASONS:
        return Cause.IMAGE
    if container.waiting_reason in _CONFIGURATION_REASONS:
        return Cause.CONFIGURATION
    if container.waiting_reason in NOT_STARTED_REASONS:
        return Cause.NOT_STARTED
    return None
