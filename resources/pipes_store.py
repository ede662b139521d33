"""Writer of Pipes messages to an object store, which runs in the pod. Needs only dagster_pipes.

Each process writes chunks to a separate folder, so that a restarted container never overwrites an earlier one's chunks.
While the store does not respond, chunks are kept in memory and training continues.
"""

import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

from dagster_pipes import PipesDefaultMessageWriter, PipesMessage, PipesMessageWriterChannel, PipesParams

from resources.errors import StoreError
from resources.object_store import ObjectStore, open_store

STORE_URI_PARAM = "store_uri"
"""Key of the Pipes params in which the reader passes the destination of messages."""

_log = logging.getLogger(__name__)


def parse_object(data: bytes) -> dict[str, Any] | None:
    """The JSON object in the bytes; None for anything else, because a process in the pod may write anything."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


@dataclass(eq=False)
class PipesStoreMessageWriter(PipesDefaultMessageWriter):
    """Writes to the object store if the reader requests it, otherwise as dagster_pipes does by default.

    Pass it to `open_dagster_pipes(message_writer=...)`. On exit, buffered messages are written; StoreError if the store
    is unavailable for `close_timeout_seconds`, so that a process whose result is lost does not exit successfully.
    """

    open_store: Callable[[str], ObjectStore] = open_store
    interval_seconds: float = 1.0
    close_timeout_seconds: float = 300.0

    @contextmanager
    def open(self, params: PipesParams) -> Iterator[PipesMessageWriterChannel]:
        if STORE_URI_PARAM not in params:
            with super().open(params) as channel:
                yield channel
            return
        channel = _StoreChannel(self.open_store(params[STORE_URI_PARAM]), self.interval_seconds)
        try:
            yield channel
        finally:
            channel.close(self.close_timeout_seconds)


class _StoreChannel(PipesMessageWriterChannel):
    """Buffers messages and writes them from a thread, in order, each chunk until the store takes it."""

    def __init__(self, store: ObjectStore, interval_seconds: float):
        self._store = store
        self._interval_seconds = interval_seconds
        self._lines: SimpleQueue[str] = SimpleQueue()
        self._closing = Event()
        self._deadline = float("inf")
        self._error: Exception | None = None
        """Why the newest chunk is not in the store."""
        self._thread = Thread(target=self._run, name="pipes-messages", daemon=True)
        self._thread.start()

    def write_message(self, message: PipesMessage) -> None:
        self._lines.put(
            f"{json.dumps(message)}\n"
        )  # serialized here, so that the caller gets the error for a value that is not JSON

    def close(self, timeout_seconds: float) -> None:
        """Write the buffered messages. StoreError if the store does not accept them in time."""
        self._deadline = time.monotonic() + timeout_seconds
        self._closing.set()
        self._thread.join()
        if self._error:
            raise StoreError(
                f"Pipes messages could not be written to {self._store.uri()} within {timeout_seconds:.0f} s: "
                f"{self._error}",
                transient=isinstance(self._error, StoreError) and self._error.transient,
            ) from self._error

    def _run(self) -> None:
        folder, num_chunks = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}", 0
        while True:
            closing = self._closing.wait(self._interval_seconds)
            lines = [self._lines.get() for _ in range(self._lines.qsize())]
            if lines:
                self._write(f"{folder}/{num_chunks:08d}.jsonl", "".join(lines).encode())
                if self._error:  # stop here: a later chunk that succeeds must not hide that this one is lost
                    return
                num_chunks += 1
            elif closing:
                return

    def _write(self, key: str, chunk: bytes) -> None:
        while True:
            try:
                self._store.write(key, chunk)
                self._error = None
                return
            except Exception as error:  # no exception may end the thread, which would lose all later messages
                if self._error is None:
                    _log.warning("Pipes messages are waiting for the object store: %s", error)
                self._error = error
            if time.monotonic() > self._deadline:
                return
            time.sleep(self._interval_seconds)
