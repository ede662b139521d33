"""Waiting for a custom resource to end, showing its logs meanwhile. No Dagster; clock and sleeper are given.

Only the resource's own state says how it ended. Pods, logs and events that cannot be read cost detail and nothing else.
A look at the resource that fails, in whatever way, is repeated until an outage has lasted too long.
"""

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

from resources.interrupts import sleep
from resources.kubernetes.api import CustomResource, CustomResourceClient
from resources.kubernetes.diagnosis import Outage, PodHistory, WatchLimits
from resources.kubernetes.errors import ApiError, ResourceDeletedError
from resources.kubernetes.logs import LogLine, ReplicaLogs, show_line
from resources.kubernetes.pods import Pod

T = TypeVar("T", bound=CustomResource)
L = TypeVar("L", bound=WatchLimits)


class Watcher(ABC, Generic[T, L]):
    """Watches one object to its end. A kind says which pods are its own, what to log, and when it is given up."""

    def __init__(
        self,
        client: CustomResourceClient[T],
        found: T,
        *,
        limits: L,
        on_log_line: Callable[[LogLine], None] = show_line,
        on_tick: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        sleeper: Callable[[float], None] = sleep,
        logger: logging.Logger,
    ):
        self._client = client
        self._found = found
        self._limits = limits
        self._on_log_line = on_log_line
        self._on_tick = on_tick
        self._clock = clock
        self._sleep = sleeper
        self._log = logger
        self._history = PodHistory()
        self._logs = ReplicaLogs(client, found.namespace, clock, logger)
        self._outage = Outage(
            clock, limits.outage_timeout_seconds, logger=logger, meanwhile="the work continues without being watched"
        )
        self._state = "unknown"
        self._pods: Sequence[Pod] = ()
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
    def _report(self, current: T) -> str:
        """Log what changed since the last look, and return the object's state in a word."""

    @abstractmethod
    def _pods_of(self, current: T) -> Sequence[Pod]:
        """Pods whose logs are shown."""

    @abstractmethod
    def _give_up_if_stuck(self, current: T, pods: Sequence[Pod] | None) -> None:
        """Raise an error of the kind for an object that will not end. `pods` is None where they cannot be listed."""

    def _look(self) -> T | None:
        """One look; the object when it has finished."""
        current = self._client.get(self._found.namespace, self._found.name)
        if current is None or current.uid != self._found.uid or current.deleting:
            raise ResourceDeletedError(
                f"{self._found} was deleted by someone else while this step waited for it. Its last state was "
                f"{self._state}. Run the step again to start a new one."
            )
        self._state = self._report(current)
        pods = self._list_pods(current)
        if current.finished:
            self._show(self._logs.drain(self._pods, self._sleep))
            return current
        self._show(self._logs.poll(pods or ()))
        self._give_up_if_stuck(current, pods)
        return None

    def _list_pods(self, current: T) -> Sequence[Pod] | None:
        try:
            self._pods = self._pods_of(current)
        except ApiError as error:
            if self._pods_are_read:
                self._log.warning("The pods cannot be listed for now: %s", error)
            self._pods_are_read = False
            return None
        self._pods_are_read = True
        self._history.observe(self._pods)
        return self._pods

    def _show(self, lines: Iterable[LogLine]) -> None:
        for line in lines:
            self._on_log_line(line)
