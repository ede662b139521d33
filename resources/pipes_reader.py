"""Reader of Pipes messages in an object store. The writer in the pod is resources/pipes_store.py.

Polls on the caller's thread and sees only whole chunks, also of a process on this machine: Dagster's reader of a local
file ends at a line that the process has written only in part. Every attachment reads a job's messages from the first
one, so results are complete after a re-attach; a mark in the store shows which of them this Dagster run has already
recorded.
"""

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import dagster as dg
from dagster_pipes import PipesParams

from resources.dagster_private import CheckError, DagsterPipesExecutionError
from resources.errors import ExplainedError, ObjectNotFoundError, StoreError
from resources.object_store import ObjectStore
from resources.pipes_store import STORE_URI_PARAM, parse_object

MESSAGES_FOLDER = "messages"
MARKS_FOLDER = "read"

OnMessage = Callable[[Any, bool], None]
"""Handles a custom message; the flag says whether an earlier attempt of this Dagster run already received it."""

_SHOWN_ONCE = ("log", "log_external_stream")
_MALFORMED = (
    CheckError,
    dg.DagsterError,
    DagsterPipesExecutionError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
)
"""Raised by Dagster for a message whose content is not valid."""


class MessagesLostError(ExplainedError):
    """The job's Pipes messages could not be read completely."""


@dataclass(eq=False)
class PipesStoreMessageReader(dg.PipesMessageReader):
    """Passes a job's messages to Dagster. Call `poll` periodically, and `drain` after the job has ended."""

    store: ObjectStore
    launch_id: str
    """Names the job's folder below the store's root; `attach` changes it when an existing job is adopted."""
    run_id: str
    logger: logging.Logger
    on_message: OnMessage | None = None
    _handler: dg.PipesMessageHandler | None = None
    _opened: bool = False
    _closed: Any = None
    _handled_up_to: dict[str, str] = field(default_factory=dict)
    """The last chunk of each writer that this attempt has handled."""
    _marked_up_to: dict[str, str] | None = None
    """The same of every attempt of this Dagster run, as its mark in the store says; None until that is read."""
    _unreadable: bool = False

    @contextmanager
    def read_messages(self, handler: dg.PipesMessageHandler) -> Iterator[PipesParams]:
        self._handler = handler
        try:
            yield {STORE_URI_PARAM: self._uri}
        finally:
            if self._closed:
                with self._ignoring_damage(self._closed):
                    handler.handle_message(self._closed)
            self._handler = None

    def attach(self, launch_id: str) -> None:
        """Read the messages of the job made by this create call. Call only before the first poll."""
        self.launch_id = launch_id

    def poll(self) -> None:
        """Handle the messages that have arrived. If the store does not respond, the next call retries."""
        try:
            self._poll()
            self._unreadable = False
        except StoreError as error:
            if not self._unreadable:
                self.logger.warning("Messages of the job remain in the object store for now: %s", error)
            self._unreadable = True

    def drain(self, *, timeout_seconds: float, clock: Callable[[], float], sleeper: Callable[[float], None]) -> None:
        """Handle all messages of a job that has ended. MessagesLostError if the store is unavailable for too long."""
        deadline = clock() + timeout_seconds
        while True:
            try:
                return self._poll()
            except StoreError as error:
                if clock() > deadline:
                    raise MessagesLostError(
                        f"The job ended, but its messages in {self._uri} could not be read for "
                        f"{timeout_seconds:.0f} s: {error} Retry the step: a job in a cluster is not run again, "
                        "and a local training continues from its checkpoint.",
                        transient=True,
                    ) from error
                sleeper(1.0)

    def no_messages_debug_text(self) -> str:
        return (
            f"Attempted to read messages from {self._uri}. Its writer must call "
            "open_dagster_pipes(message_writer=PipesStoreMessageWriter())."
        )

    @property
    def _folder(self) -> str:
        return f"{MESSAGES_FOLDER}/{self.launch_id}/"

    @property
    def _uri(self) -> str:
        return self.store.at(self._folder).uri()

    def _poll(self) -> None:
        mark = f"{MARKS_FOLDER}/{self.launch_id}/{self.run_id}.json"
        if self._marked_up_to is None:
            self._marked_up_to = self._load_mark(mark)
        for info in self.store.list(self._folder):
            writer, _, chunk = info.key.removeprefix(self._folder).partition("/")
            if chunk > self._handled_up_to.get(writer, ""):
                self._handle_chunk(info.key, replayed=chunk <= self._marked_up_to.get(writer, ""))
                self._handled_up_to[writer] = chunk
        newer = {w: c for w, c in self._handled_up_to.items() if c > self._marked_up_to.get(w, "")}
        if newer:
            marked = {**self._marked_up_to, **newer}
            self.store.write(mark, json.dumps(marked).encode())
            self._marked_up_to = marked

    def _load_mark(self, key: str) -> dict[str, str]:
        try:
            mark = parse_object(self.store.read(key))
        except ObjectNotFoundError:
            return {}
        if mark is None or not all(isinstance(chunk, str) for chunk in mark.values()):
            self.logger.warning("%s is not a valid read mark: messages may be recorded again.", key)
            return {}
        return mark

    def _handle_chunk(self, key: str, *, replayed: bool) -> None:
        for line in self.store.read(key).split(b"\n"):
            message = parse_object(line)
            if message is not None and {"method", "params"} <= set(message):
                with self._ignoring_damage(message):
                    self._handle(message, replayed=replayed)
            elif line:
                self.logger.warning("Ignoring a line in %s that is not a Pipes message: %s", key, ascii(line[:100]))

    @contextmanager
    def _ignoring_damage(self, message: Mapping[str, Any]) -> Iterator[None]:
        try:
            yield
        except _MALFORMED as error:  # it must not end hours of work
            self.logger.warning(
                "Ignoring a message in %s that is not valid: %s. %s", self._uri, ascii(message)[:100], error
            )

    def _handle(self, message: Mapping[str, Any], *, replayed: bool) -> None:
        if self._handler is None:
            raise MessagesLostError("Messages are handled only while the Pipes session is open.")
        # message               new              replayed: an earlier attempt of this run handled it
        # first "opened"        to Dagster       to Dagster
        # another "opened"      logged           nothing
        # of _SHOWN_ONCE        to Dagster       nothing
        # "closed"              at the end       at the end
        # any other             to Dagster       to Dagster, and marked as replayed to `on_message`
        method = message["method"]
        if method == "closed":
            self._closed = message  # the last process to close counts: passed on when the session ends
            return
        if method == "opened":
            again, self._opened, self._closed = self._opened, True, None
            if again:
                if not replayed:
                    self.logger.info("The job's process was restarted; reading its messages continues.")
                return
        if replayed and method in _SHOWN_ONCE:
            return
        self._handler.handle_message(message)  # pyright: ignore[reportArgumentType]  # JSON of a PipesMessage
        if method == "report_custom_message" and self.on_message:
            self.on_message(message["params"]["payload"], replayed)
