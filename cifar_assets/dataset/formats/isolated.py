"""Outside bytes are read in a process of their own: a file that kills its reader costs nothing but itself.

One child serves this process, one file at a time, and is started again after it died. It has limits on memory and
processor time, gets none of the environment's credentials, and ends when it is idle or its parent is gone. It protects
the parent from crashes, memory use and endless loops; it is not a sandbox against code that a file manages to run.
"""

import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from cifar_assets.dataset.formats.pickles import HostileDataError
from cifar_assets.dataset.progress import report
from resources.errors import DataError, ExplainedError

MEMORY_BYTES = 1 << 30
"""Memory for reading one file. Enforced on Linux; macOS has no such limit."""
CPU_SECONDS, CPU_SECONDS_PER_MIB = 60, 2
_WALL_SECONDS_PER_CPU_SECOND = 10
_START_SECONDS = 120
_HEADER = struct.Struct(">QQ")
_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONDONTWRITEBYTECODE")
_COMMAND = [sys.executable, "-P", "-m", "cifar_assets.dataset.formats.isolated_child"]


class ReaderKilledError(DataError):
    """A file ended the process that read it: by a crash, by memory, or by time."""


class ReaderFailedError(ExplainedError):
    """The reader failed on a file for a reason that nobody thought of. Nothing is known of the file."""


class _ChildEndedError(Exception):
    """The child is gone, or must be ended; the text says why."""


class _Child:
    def __init__(self) -> None:
        environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CIFAR_READER_MEMORY": str(MEMORY_BYTES)}
        # Each of these would reserve address space far beyond what it uses.
        environment |= {"MALLOC_ARENA_MAX": "2", "ARROW_DEFAULT_MEMORY_POOL": "system"}
        environment |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "ARROW_IO_THREADS"), "2")
        self.process = subprocess.Popen(
            _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0
        )
        self.owner = os.getpid()
        self.is_fresh = True
        try:
            self.receive(time.monotonic() + _START_SECONDS)
        except _ChildEndedError as death:
            self.kill()
            raise ExplainedError(f"The process that reads outside data does not start: it {death}.") from death

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def send(self, message: Mapping[str, Any], payload: bytes) -> None:
        assert self.process.stdin is not None
        try:
            write_frame(self.process.stdin.write, message, payload)
        except BrokenPipeError:
            self._raise_death()

    def receive(self, deadline: float) -> tuple[dict[str, Any], bytes]:
        stdout = self.process.stdout
        assert stdout is not None

        def read(num_bytes: int) -> bytes:
            if not select.select([stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise _ChildEndedError("took too long to read")
            return stdout.read(num_bytes)

        try:
            return read_frame(read)
        except EOFError:
            self._raise_death()

    def _raise_death(self) -> NoReturn:
        code = self.process.wait()
        if code == -signal.SIGXCPU:
            raise _ChildEndedError("took too much processor time")
        if code < 0:
            raise _ChildEndedError(f"ended its reader with {signal.Signals(-code).name}")
        raise _ChildEndedError(f"ended its reader with exit status {code}")


_lock = threading.Lock()
_child: _Child | None = None


def ask(
    operation: str,
    arguments: Mapping[str, Any],
    name: str,
    *,
    payload: bytes = b"",
    num_bytes: int,
) -> tuple[Any, bytes]:
    """Let the child do an operation of `isolated_child` on `num_bytes` of outside data, which errors call `name`.

    Raises DataError and HostileDataError as the reader does, ReaderKilledError when the data killed a child that had
    read nothing else before, ReaderFailedError for anything that no reader should raise.
    """
    seconds = CPU_SECONDS + CPU_SECONDS_PER_MIB * (num_bytes >> 20)
    request = {"operation": operation, "arguments": arguments, "cpu_seconds": seconds}
    try:
        answer, data = _converse(request, payload, name, seconds)
    except _ChildEndedError as death:
        raise ReaderKilledError(
            f"{name} {death} (limits: {MEMORY_BYTES >> 20:,} MiB of memory, {seconds:,} s of processor time). "
            "It is damaged, made to do harm, or far larger than it looks."
        ) from death
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


def write_frame(write: Callable[[memoryview], int | None], message: Mapping[str, Any], payload: bytes = b"") -> None:
    """Send a message: lengths, JSON, and bytes that belong to it."""
    text = json.dumps(message).encode()
    for part in (_HEADER.pack(len(text), len(payload)) + text, payload):
        left = memoryview(part)
        while left:
            left = left[write(left) or 0 :]


def read_frame(read: Callable[[int], bytes]) -> tuple[dict[str, Any], bytes]:
    """The next message; EOFError when there is none."""

    def exactly(num_bytes: int) -> bytes:
        found = bytearray()
        while len(found) < num_bytes:
            part = read(min(num_bytes - len(found), 1 << 20))
            if not part:
                raise EOFError
            found += part
        return bytes(found)

    text_bytes, payload_bytes = _HEADER.unpack(exactly(_HEADER.size))
    return json.loads(exactly(text_bytes)), exactly(payload_bytes)


def _converse(request: Mapping[str, Any], payload: bytes, name: str, seconds: int) -> tuple[dict[str, Any], bytes]:
    """The child's answer. A child that read other data before is not believed to have died of this data."""
    global _child
    with _lock:
        while True:
            if _child is None or _child.owner != os.getpid():
                _child = _Child()
            child, was_fresh, _child.is_fresh = _child, _child.is_fresh, False
            try:
                child.send(request, payload)
                deadline = time.monotonic() + seconds * _WALL_SECONDS_PER_CPU_SECOND
                while "rows" in (found := child.receive(deadline))[0]:
                    report(f"validating {name}", found[0]["rows"])
                if "memory" in found[0]:
                    raise _ChildEndedError("needs too much memory")
                return found
            except _ChildEndedError:
                stop()
                if was_fresh:
                    raise
            except BaseException:
                stop()  # nobody waits for what it still sends
                raise
