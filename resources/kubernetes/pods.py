"""The relevant state of a pod, extracted from the API object. Pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ContainerExit:
    """One exit of a container."""

    replica: str
    pod: str
    container: str
    exit_code: int
    reason: str
    message: str
    finished_at: str
    """ISO time in UTC, so that string order is time order; empty if the kubelet reported none."""

    @property
    def failed(self) -> bool:
        return self.exit_code != 0

    @property
    def out_of_memory(self) -> bool:
        return self.reason == "OOMKilled"


@dataclass(frozen=True)
class Container:
    """Current state of a container."""

    name: str
    init: bool
    started: bool
    """Whether it is or was running, so that it has a log."""
    restarts: int
    waiting_reason: str
    waiting_message: str
    exits: tuple[ContainerExit, ...]
    """The exits that the API still has: in the current and in the previous state."""
    ended: bool


@dataclass(frozen=True)
class Pod:
    """Current state of a pod."""

    name: str
    uid: str
    replica: str
    """Display name: master-0 or worker-3 in a training, otherwise the pod's name."""
    phase: str
    reason: str
    message: str
    deleting: bool
    unschedulable: str
    """The scheduler's message if it found no node; otherwise empty."""
    containers: tuple[Container, ...]
    ready: bool
    """Whether it receives requests. A pod that is being deleted is not ready."""
    labels: Mapping[str, str]
    annotations: Mapping[str, str]

    @property
    def finished(self) -> bool:
        return self.phase in ("Succeeded", "Failed")


def read_pod(pod: Any, replica: str) -> Pod:
    """Pod from a V1Pod, with `replica` as its display name."""
    status, name = pod.status, pod.metadata.name
    deleting = pod.metadata.deletion_timestamp is not None
    inits = [_container(name, replica, each, init=True) for each in status.init_container_statuses or ()]
    mains = [_container(name, replica, each, init=False) for each in status.container_statuses or ()]
    return Pod(
        name=name,
        uid=pod.metadata.uid,
        replica=replica,
        phase=status.phase or "Pending",
        reason=status.reason or "",
        message=status.message or "",
        deleting=deleting,
        unschedulable=_unschedulable(status.conditions or ()),
        containers=(*inits, *mains),
        ready=not deleting and any(c.type == "Ready" and c.status == "True" for c in status.conditions or ()),
        labels=pod.metadata.labels or {},
        annotations=pod.metadata.annotations or {},
    )


def _unschedulable(conditions: Sequence[Any]) -> str:
    for condition in conditions:
        if condition.type == "PodScheduled" and condition.status == "False":
            return condition.message or condition.reason or "no reason given"
    return ""


def _container(pod: str, replica: str, status: Any, *, init: bool) -> Container:
    states = [state for state in (status.state, status.last_state) if state]
    ends = [state.terminated for state in states if state.terminated]
    waiting = status.state.waiting if status.state else None
    return Container(
        name=status.name,
        init=init,
        started=bool(ends) or bool(status.state and status.state.running),
        restarts=status.restart_count or 0,
        waiting_reason=(waiting.reason or "") if waiting else "",
        waiting_message=(waiting.message or "") if waiting else "",
        exits=tuple(
            ContainerExit(
                replica=replica,
                pod=pod,
                container=status.name,
                exit_code=end.exit_code,
                reason=end.reason or "",
                message=(end.message or "").strip(),
                finished_at=end.finished_at.isoformat() if end.finished_at else "",
            )
            for end in ends
        ),
        ended=bool(status.state and status.state.terminated),
    )
