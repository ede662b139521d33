"""Logs of every pod, polled while it runs, with each line shown once. For display only.

Polling with an overlap needs no thread per pod, survives API server outages, and cannot end early. Nothing depends on
these logs, because Pipes messages go through the object store, so a log that cannot be read is never an error.
"""

import contextlib
import logging
import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from resources.kubernetes.api import CustomResourceClient
from resources.kubernetes.errors import KubernetesError
from resources.kubernetes.pods import Container, Pod

TAIL_LINES = 30
_OVERLAP_SECONDS = 10
"""Each read reaches back this much further than the previous read."""
_RETRY_SECONDS, _LONGEST_RETRY_SECONDS = 5.0, 300.0
"""Delay after a failed read, doubled each time: the read may have lasted until the request timeout."""
_PATIENCE_SECONDS = 20.0
"""Limit for one round of reads, and for the last lines."""


@dataclass(frozen=True)
class LogLine:
    """One line of one container."""

    replica: str
    container: str
    text: str


def show_line(line: LogLine) -> None:
    """Write the line to this process's output."""
    with contextlib.suppress(OSError, ValueError):  # closed, or with an encoding that lacks a character
        sys.stdout.write(f"[{line.replica}] {line.text}\n")
        sys.stdout.flush()


@dataclass
class _Cursor:
    """How far a container's log has been shown."""

    restarts: int
    read_at: float | None = None
    retry_at: float | None = None
    """Set while the last read has failed."""
    retry_seconds: float = _RETRY_SECONDS
    shown: frozenset[str] = frozenset()
    """Lines of the last read, with their time stamps: the next one overlaps with it."""
    complete: bool = False


@dataclass
class ReplicaLogs:
    """Follows the logs of pods. `tails` keeps the last lines of each replica, including deleted pods."""

    client: CustomResourceClient[Any]
    namespace: str
    clock: Callable[[], float]
    logger: logging.Logger
    _cursors: dict[tuple[str, str], _Cursor] = field(default_factory=dict)
    _tails: dict[str, deque[str]] = field(default_factory=dict)

    @property
    def tails(self) -> Mapping[str, Sequence[str]]:
        return {replica: list(lines) for replica, lines in self._tails.items()}

    def poll(self, pods: Iterable[Pod]) -> Iterator[LogLine]:
        """Lines not returned before. A log that cannot be read now is read by a later call."""
        began = self.clock()
        for pod in pods:
            for container in pod.containers:
                in_time = self.clock() - began < _PATIENCE_SECONDS
                if container.started and not container.init and in_time:
                    yield from self._poll(pod, container)

    def drain(self, pods: Sequence[Pod], sleeper: Callable[[float], None]) -> Iterator[LogLine]:
        """The last lines of finished pods. Retries for a short time if a log cannot be read."""
        deadline = self.clock() + _PATIENCE_SECONDS
        uids = {pod.uid for pod in pods}
        yield from self.poll(pods)
        while self.clock() < deadline and any(
            uid in uids and cursor.retry_at is not None for (uid, _), cursor in self._cursors.items()
        ):
            sleeper(_RETRY_SECONDS)
            yield from self.poll(pods)

    def _poll(self, pod: Pod, container: Container) -> Iterator[LogLine]:
        cursor = self._cursors.setdefault((pod.uid, container.name), _Cursor(restarts=container.restarts))
        if cursor.complete and cursor.restarts == container.restarts:
            return
        if cursor.retry_at is not None and self.clock() < cursor.retry_at:
            return
        try:
            if container.restarts > cursor.restarts:
                yield from self._read(pod, container, cursor, previous=True)
                cursor.restarts = container.restarts
            yield from self._read(pod, container, cursor, previous=False)
        except KubernetesError as error:
            if cursor.retry_at is None:
                self.logger.warning("Lines are not shown for now: %s", error)
            cursor.retry_at = self.clock() + cursor.retry_seconds
            cursor.retry_seconds = min(2 * cursor.retry_seconds, _LONGEST_RETRY_SECONDS)
            return
        cursor.retry_at, cursor.retry_seconds = None, _RETRY_SECONDS
        cursor.complete = container.ended

    def _read(self, pod: Pod, container: Container, cursor: _Cursor, *, previous: bool) -> Iterator[LogLine]:
        now = self.clock()
        # Relative to now on the node's clock, so that a difference between the clocks does not matter.
        since = None if cursor.read_at is None else math.ceil(now - cursor.read_at) + _OVERLAP_SECONDS
        text = self.client.log(self.namespace, pod.name, container.name, since_seconds=since, previous=previous)
        if text is None:
            return
        cursor.read_at = now
        lines = text.split("\n")
        if not (previous or container.ended):
            lines.pop()  # the next read returns the rest of a line that is still being written
        lines = [line for line in lines if line[:1].isdigit()]  # a line without a timestamp says that the log is gone
        for line in lines:
            if line not in cursor.shown:
                content = line.partition(" ")[2].rstrip("\r")
                self._tails.setdefault(pod.replica, deque(maxlen=TAIL_LINES)).append(content)
                yield LogLine(pod.replica, container.name, content)
        if lines:
            cursor.shown = frozenset(lines)
