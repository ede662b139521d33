"""Waiting for a custom resource to end, showing its logs meanwhile. No Dagster; clock and sleeper are given.

Only the resource's own state says how it ended. Pods, logs and events that cannot be read cost detail and nothing else.
A look at the resource that fails, in whatever way, is repeated until an outage has lasted too long.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

from resources.kubernetes.api import CustomResourceClient
from resources.kubernetes.diagnosis import Outage, PodHistory, WatchLimits
from resources.kubernetes.errors import ApiError
from resources.kubernetes.logs import LogLine, ReplicaLogs
from resources.kubernetes.pods import Pod

T = TypeVar("T")
L = TypeVar("L", bound=WatchLimits)


class Watcher(ABC, Generic[T, L]):
    """Watches one object to its end. A kind says how it is read, which pods are its own, and when it is given up."""

    def __init__(
        self,
        client: CustomResourceClient[Any],
        namespace: str,
        *,
        limits: L,
        on_log_line: Callable[[LogLine], None],
        on_tick: Callable[[], None] = lambda: None,
        clock: Callable[[], float],
        sleeper: Callable[[float], None],
        logger: logging.Logger,
    ):
        self._limits = limits
        self._on_log_line = on_log_line
        self._on_tick = on_tick
        self._clock = clock
        self._sleep = sleeper
        self._log = logger
        self._history = PodHistory()
        self._logs = ReplicaLogs(client, namespace, clock, logger)
        self._outage = Outage(
            clock, limits.outage_timeout_seconds, logger=logger, meanwhile="the work continues without being watched"
        )
        self._seen: Sequence[Pod] = ()
        self._pods_are_read = True

    def wait_until_finished(self) -> T:
        """The finished object, however it ended. ApiError after too long an outage; else what the kind raises."""
        while True:
            try:
                finished = self._look()
                self._outage.end()
            except ApiError as error:
                finished = None
                self._outage.endure(error)
            self._on_tick()
            if finished:
                return finished
            self._sleep(self._limits.poll_interval_seconds)

    @abstractmethod
    def _read(self) -> T:
        """The object as it is now. Raises an error of the kind for one that was deleted."""

    @abstractmethod
    def _pods_of(self, current: T) -> Sequence[Pod]:
        """Pods whose logs are shown."""

    @abstractmethod
    def _is_finished(self, current: T) -> bool: ...

    @abstractmethod
    def _give_up_if_stuck(self, current: T, pods: Sequence[Pod] | None) -> None:
        """Raise an error of the kind for an object that will not end. `pods` is None where they cannot be listed."""

    def _look(self) -> T | None:
        """One look; the object when it has finished."""
        current = self._read()
        pods = self._list_pods(current)
        if self._is_finished(current):
            self._show(self._logs.drain(self._seen, self._sleep))
            return current
        self._show(self._logs.poll(pods or ()))
        self._give_up_if_stuck(current, pods)
        return None

    def _list_pods(self, current: T) -> Sequence[Pod] | None:
        try:
            self._seen = self._pods_of(current)
        except ApiError as error:
            if self._pods_are_read:
                self._log.warning("The pods are not seen for now: %s", error)
            self._pods_are_read = False
            return None
        self._pods_are_read = True
        self._history.observe(self._seen)
        return self._seen

    def _show(self, lines: Iterable[LogLine]) -> None:
        for line in lines:
            self._on_log_line(line)
