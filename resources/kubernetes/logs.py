"""Logs of every pod, read again and again while it runs, each line shown once. For display only.

Polling with an overlap needs no thread for each pod, survives an API server that goes away, and cannot end early.
Nothing that matters is carried this way: Pipes messages go through the object store.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from resources.kubernetes.api import KubernetesClient
from resources.kubernetes.errors import ApiRefusedError
from resources.kubernetes.pods import Container, Pod

TAIL_LINES = 30
_OVERLAP_SECONDS = 10
"""Each read reaches back this much further than the time since the one before."""


@dataclass(frozen=True)
class LogLine:
    """One line of one container."""

    replica: str
    container: str
    text: str


@dataclass
class _Cursor:
    """How far one container's log was shown: the last time stamp, and how many lines bore it."""

    read_at: float | None = None
    stamp: str = ""
    num_at_stamp: int = 0
    restarts: int = 0
    complete: bool = False


class ReplicaLogs:
    """Follows the logs of pods. `tails` keeps the last lines of each replica, also of pods that are gone."""

    def __init__(self, client: KubernetesClient, namespace: str, clock: Callable[[], float]):
        self._client = client
        self._namespace = namespace
        self._clock = clock
        self._cursors: dict[tuple[str, str], _Cursor] = {}
        self._tails: dict[str, deque[str]] = {}
        self.refused: ApiRefusedError | None = None
        """Set when logs may not be read; the work goes on without them."""

    @property
    def tails(self) -> Mapping[str, Sequence[str]]:
        return {replica: list(lines) for replica, lines in self._tails.items()}

    def poll(self, pods: Iterable[Pod]) -> Iterator[LogLine]:
        """Lines that were not given before. ApiUnavailableError leaves the rest for the next call."""
        for pod in pods:
            for container in pod.containers:
                if container.started and not container.init and self.refused is None:
                    yield from self._poll(pod, container)

    def _poll(self, pod: Pod, container: Container) -> Iterator[LogLine]:
        cursor = self._cursors.setdefault((pod.uid, container.name), _Cursor(restarts=container.restarts))
        if cursor.complete and cursor.restarts == container.restarts:
            return
        try:
            if container.restarts > cursor.restarts:
                yield from self._read(pod, container, cursor, previous=True)
                cursor.restarts = container.restarts
            yield from self._read(pod, container, cursor, previous=False)
        except ApiRefusedError as error:
            self.refused = error
            return
        cursor.complete = container.ended

    def _read(self, pod: Pod, container: Container, cursor: _Cursor, *, previous: bool) -> Iterator[LogLine]:
        now = self._clock()
        # Counted back from now on the node's own clock, so that a difference between the clocks does not matter.
        since = None if cursor.read_at is None else math.ceil(now - cursor.read_at) + _OVERLAP_SECONDS
        text = self._client.log(self._namespace, pod.name, container.name, since_seconds=since, previous=previous)
        if text is None:
            return
        cursor.read_at = now
        final = previous or container.ended
        for line in _new_lines(text, cursor, final):
            self._tails.setdefault(pod.replica, deque(maxlen=TAIL_LINES)).append(line)
            yield LogLine(pod.replica, container.name, line)


def _new_lines(text: str, cursor: _Cursor, final: bool) -> Iterator[str]:
    """Lines after the cursor, which moves along. A last line without its end is left for the next read."""
    lines = text.split("\n")
    unfinished = lines.pop()
    if final:
        lines.append(unfinished)
    num_seen_at_stamp = 0
    start, num_start = cursor.stamp, cursor.num_at_stamp
    for line in lines:
        stamp, _, content = line.rstrip("\r").partition(" ")
        stamp = _padded(stamp)
        if stamp < start or not stamp[0].isdigit():  # the kubelet answers with a bare sentence when a log is gone
            continue
        if stamp == start:
            num_seen_at_stamp += 1
            if num_seen_at_stamp <= num_start:
                continue
        cursor.num_at_stamp = cursor.num_at_stamp + 1 if stamp == cursor.stamp else 1
        cursor.stamp = stamp
        yield content


def _padded(stamp: str) -> str:
    """An RFC 3339 time with nine decimals: the API drops trailing zeros, which breaks the order of the texts."""
    whole, dot, fraction = stamp.removesuffix("Z").partition(".")
    return f"{whole}.{fraction if dot else '':0<9}"
