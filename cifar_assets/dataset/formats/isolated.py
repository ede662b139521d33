"""Outside bytes are read in a process of their own: a file that kills its reader costs nothing but itself.

One child (`isolated_child`) serves this process, one file at a time, and is started again after it died. It has limits
on memory and processor time, gets none of the environment's credentials, and ends when it is idle or its parent is
gone. It protects the parent from crashes, memory use and endless loops; it is not a sandbox against code that a file
manages to run.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from cifar_assets.dataset.formats.pickles import HostileDataError
from cifar_assets.dataset.progress import report
from resources.errors import DataError, ExplainedError

MEMORY_BYTES = 1 << 30
"""Memory for reading one file. Enforced on Linux; macOS has no such limit."""
CPU_SECONDS, CPU_SECONDS_PER_MIB = 60, 2
_WALL_SECONDS_PER_CPU_SECOND = 10
_START_SECONDS = 120
_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONDONTWRITEBYTECODE")
_COMMAND = [sys.executable, "-P", "-m", "cifar_assets.dataset.formats.isolated_child"]


class ReaderKilledError(DataError):
    """A file ended the process that read it: by a crash, by memory, or by time."""


class ReaderFailedError(ExplainedError):
    """The reader failed on a file for an unforeseen reason. Nothing is known of the file."""


class _ChildEndedError(Exception):
    """The child is gone, or must be ended; the text says why."""


class _Child:
    def __init__(self) -> None:
        environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CIFAR_READER_MEMORY": str(MEMORY_BYTES)}
        # Each of these would reserve address space far beyond what it uses.
        environment |= {"MALLOC_ARENA_MAX": "2", "ARROW_DEFAULT_MEMORY_POOL": "system"}
        environment |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "ARROW_IO_THREADS"), "2")
        self.owner, self.is_fresh = os.getpid(), True
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        with theirs:
            self.process = subprocess.Popen(_COMMAND, stdin=theirs.fileno(), stdout=2, env=environment)
        try:
            self._receive(time.monotonic() + _START_SECONDS)
        except _ChildEndedError as death:
            self.kill()
            raise ExplainedError(f"The process that reads outside data does not start: it {death}.") from death

    def kill(self) -> None:
        self._connection.close()
        self.process.kill()
        self.process.wait()

    def answer(self, request: Mapping[str, Any], payload: bytes, name: str) -> tuple[dict[str, Any], bytes]:
        deadline = time.monotonic() + request["cpu_seconds"] * _WALL_SECONDS_PER_CPU_SECOND
        self.is_fresh = False
        try:
            send(self._connection, request, payload)
        except OSError:
            raise _ChildEndedError(self._cause_of_death()) from None
        while "rows" in (found := self._receive(deadline))[0]:
            report(f"validating {name}", found[0]["rows"])
        if "memory" in found[0]:
            raise _ChildEndedError("needs too much memory")
        return found

    def _receive(self, deadline: float) -> tuple[dict[str, Any], bytes]:
        parts = []
        for _ in range(2):  # as `receive` does
            if not self._connection.poll(max(0.0, deadline - time.monotonic())):
                raise _ChildEndedError("took too long to read")
            try:
                parts.append(self._connection.recv_bytes(MEMORY_BYTES))
            except (EOFError, OSError):
                self.process.kill()  # after an answer that cannot be one, it may still run
                raise _ChildEndedError(self._cause_of_death()) from None
        return json.loads(parts[0]), parts[1]

    def _cause_of_death(self) -> str:
        code = self.process.wait()
        if code == -signal.SIGXCPU:
            return "took too much processor time"
        return f"ended its reader with {signal.Signals(-code).name if code < 0 else f'exit status {code}'}"


_lock = threading.Lock()
_child: _Child | None = None


def ask(
    operation: str, arguments: Mapping[str, Any], name: str, *, payload: bytes = b"", num_bytes: int
) -> tuple[Any, bytes]:
    """Let the child do an operation of `isolated_child` on `num_bytes` of outside data, which errors call `name`.

    Raises DataError and HostileDataError as the reader does, ReaderKilledError when the data killed a child that had
    read nothing else before, ReaderFailedError for anything that no reader should raise.
    """
    global _child
    seconds = CPU_SECONDS + CPU_SECONDS_PER_MIB * (num_bytes >> 20)
    request = {"operation": operation, "arguments": arguments, "cpu_seconds": seconds}
    with _lock:
        while True:
            if _child is None or _child.owner != os.getpid():
                _child = _Child()
            was_fresh = _child.is_fresh
            try:
                answer, data = _child.answer(request, payload, name)
                break
            except _ChildEndedError as death:
                stop()
                if was_fresh:  # a child that read other data before may have died of that
                    raise ReaderKilledError(
                        f"{name} {death} (limits: {MEMORY_BYTES >> 20:,} MiB of memory, {seconds:,} s of processor "
                        "time). It is damaged, made to do harm, or far larger than it looks."
                    ) from death
            except BaseException:
                stop()  # nobody waits for what it still sends
                raise
    if "refused" in answer:
        raise (HostileDataError if answer["hostile"] else DataError)(answer["refused"])
    if "failed" in answer:
        raise ReaderFailedError(f"{name} cannot be read, see the log for the cause: {answer['failed']}")
    return answer["result"], data


def stop() -> None:
    """End the child. The next question starts another."""
    global _child
    if _child is not None and _child.owner == os.getpid():
        _child.kill()
    _child = None


def send(connection: Connection, message: Mapping[str, Any], payload: bytes = b"") -> None:
    """Send a message: JSON, and bytes that belong to it. Never a pickle: the other end may be in a file's hands."""
    connection.send_bytes(json.dumps(message).encode())
    connection.send_bytes(payload)


def receive(connection: Connection) -> tuple[dict[str, Any], bytes]:
    """The next message; EOFError or OSError when there is none."""
    return json.loads(connection.recv_bytes()), connection.recv_bytes()
