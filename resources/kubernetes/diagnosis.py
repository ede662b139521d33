"""What keeps pods from starting, and how they ended: from their state as it was seen over time. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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


TRANSIENT_CAUSES = (
    Cause.KILLED,
    Cause.EVICTED,
    Cause.UNSCHEDULABLE,
    Cause.NO_PODS,
    Cause.SLOW_START,
    Cause.OPERATOR_AWAY,
)
"""Those that may go away by themselves."""

_IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError")
_CONFIGURATION_REASONS = ("CreateContainerConfigError", "CreateContainerError")
NOT_STARTED_REASONS = ("RunContainerError", "StartError", "ContainerCannotRun", "CreateContainerError")


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
