"""Pipes messages through an object store: the writer, which runs in the pod. Needs dagster_pipes only.

Each process writes chunks under a folder of its own, so that a restarted container never overwrites what an earlier
one said. Chunks wait in memory while the store does not answer; training goes on.
"""

import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition, Thread

from dagster_pipes import PipesDefaultMessageWriter, PipesMessage, PipesMessageWriterChannel, PipesParams

from resources.errors import StoreError
from resources.object_store import ObjectStore, open_store

STORE_URI_PARAM = "store_uri"
"""Key of the Pipes params under which the reader says where messages go."""

_log = logging.getLogger(__name__)


class PipesStoreMessageWriter(PipesDefaultMessageWriter):
    """Writes to the object store when the reader asks for it, otherwise as dagster_pipes does by default.

    Pass it to `open_dagster_pipes(message_writer=...)`. On leaving, what is buffered is written; StoreError when the
    store stays away for `close_timeout_seconds`, so that a process whose result is lost does not end as a success.
    """

    def __init__(
        self,
        *,
        open_store: Callable[[str], ObjectStore] = open_store,
        interval_seconds: float = 1.0,
        close_timeout_seconds: float = 300.0,
    ):
        self._open_store = open_store
        self._interval_seconds = interval_seconds
        self._close_timeout_seconds = close_timeout_seconds

    @contextmanager
    def open(self, params: PipesParams) -> Iterator[PipesMessageWriterChannel]:
        if STORE_URI_PARAM not in params:
            with super().open(params) as channel:
                yield channel
            return
        store = self._open_store(params[STORE_URI_PARAM])
        channel = _StoreChannel(store, self._interval_seconds, self._close_timeout_seconds)
        try:
            yield channel
        finally:
            channel.close()


class _StoreChannel(PipesMessageWriterChannel):
    """Buffers messages and writes them from a thread, in order, each chunk until the store takes it."""

    def __init__(self, store: ObjectStore, interval_seconds: float, close_timeout_seconds: float):
        self._store = store
        self._interval_seconds = interval_seconds
        self._close_timeout_seconds = close_timeout_seconds
        self._folder = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        self._num_chunks = 0
        self._buffer: list[str] = []
        self._changed = Condition()
        self._closing_until: float | None = None
        self._error: Exception | None = None
        self._thread = Thread(target=self._run, name="pipes-messages", daemon=True)
        self._thread.start()

    def write_message(self, message: PipesMessage) -> None:
        line = f"{json.dumps(message)}\n"  # here, where who gave something that is no JSON hears of it
        with self._changed:
            self._buffer.append(line)
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closing_until = time.monotonic() + self._close_timeout_seconds
            self._changed.notify()
        self._thread.join()
        if self._buffer:
            raise StoreError(
                f"{len(self._buffer)} Pipes messages could not be written to {self._store.uri()} within "
                f"{self._close_timeout_seconds:.0f} s: {self._error}",
                transient=isinstance(self._error, StoreError) and self._error.transient,
            ) from self._error

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._buffer or self._closing_until is not None)
                pending = list(self._buffer)
            if not pending:
                return
            self._error = self._write(pending)
            if self._error is None:
                with self._changed:
                    del self._buffer[: len(pending)]
            elif self._closing_until is not None and time.monotonic() > self._closing_until:
                return
            self._pause(failed=self._error is not None)

    def _pause(self, *, failed: bool) -> None:
        """Let messages gather into one chunk, or a store recover. Closing cuts the gathering short."""
        with self._changed:
            closing = self._changed.wait_for(lambda: self._closing_until is not None, self._interval_seconds)
        if closing and failed:
            time.sleep(self._interval_seconds)

    def _write(self, lines: list[str]) -> Exception | None:
        key = f"{self._folder}/{self._num_chunks:08d}.jsonl"
        try:
            self._store.write(key, "".join(lines).encode())
        except Exception as error:  # whatever it is must not end the thread, and with it all messages to come
            _log.warning("Pipes messages wait for the object store: %s", error)
            return error
        self._num_chunks += 1
        return None
