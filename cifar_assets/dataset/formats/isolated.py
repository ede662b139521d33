"""Reads untrusted files in a separate process: a file that crashes its reader affects only itself.

A child process (`isolated_child`) reads one file after another, with limits on memory and on the time per file, and
without the environment's credentials. This protects the parent from crashes, memory use and endless loops. It is not a
sandbox against code that a file manages to run.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from resources.errors import DataError, ExplainedError

MEMORY_BYTES = 1 << 30
"""Memory limit for reading one file. Enforced on Linux; macOS has no such limit."""
CPU_SECONDS, CPU_SECONDS_PER_MIB = 60, 2
WALL_SECONDS_PER_CPU_SECOND = 10
OUT_OF_MEMORY = 86
"""Exit status of a reader that ran out of memory."""

_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "PYTHONDONTWRITEBYTECODE")
_COMMAND = [sys.executable, "-P", "-m", "cifar_assets.dataset.formats.isolated_child"]
_CAUSES = {
    OUT_OF_MEMORY: "needs too much memory",
    -signal.SIGXCPU: "took too much CPU time",
    -signal.SIGALRM: "took too long to read",
}

_lock = threading.Lock()
_child: tuple[subprocess.Popen[bytes], Connection] | None = None


class ReaderKilledError(DataError):
    """A file ended the process that read it, by a crash or by exceeding the memory or time limit."""


class ReaderFailedError(ExplainedError):
    """The reader failed on a file for an unexpected reason. Nothing is known about the file."""


def ask(task: str, arguments: Mapping[str, Any], name: str, num_bytes: int) -> bytes:
    """The result of a task of `isolated_child` for a file of `num_bytes` that is called `name` in errors.

    Raises DataError as the reader does, ReaderKilledError when the data killed its reader, ReaderFailedError for any
    other exception of the reader.
    """
    seconds = CPU_SECONDS + CPU_SECONDS_PER_MIB * (num_bytes >> 20)
    question = {
        "task": task,
        "arguments": arguments,
        "seconds": {"cpu": seconds, "wall": seconds * WALL_SECONDS_PER_CPU_SECOND},
    }
    with _lock:
        while True:
            is_fresh = _child is None or _child[0].poll() is not None
            child, connection = _running_child()
            try:
                send(connection, question)
                answer, data = receive(connection)
                break
            except (EOFError, OSError):
                connection.close()  # ends a child that sent an invalid answer
                code = child.wait()
                if is_fresh:  # a child that read other files before may have died because of those
                    cause = _CAUSES.get(code) or f"crashed its reader with {_shown(code)}"
                    raise ReaderKilledError(
                        f"{name} {cause} (limits: {MEMORY_BYTES >> 20:,} MiB of memory, {seconds:,} s of CPU time). "
                        "It is damaged, malicious, or far larger than it looks."
                    ) from None
            except BaseException:
                stop()  # its remaining output is not needed
                raise
    if "failed" in answer:
        raise ReaderFailedError(f"{name} cannot be read; see the log for the cause: {answer['failed']}")
    if "refused" in answer:
        raise DataError(answer["refused"])
    return data


def stop() -> None:
    """End the child, even while it reads. The next request starts a new one."""
    global _child
    if _child is not None:
        process, connection = _child
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        connection.close()
    _child = None


def send(connection: Connection, message: Mapping[str, Any], payload: bytes = b"") -> None:
    """Send a message: JSON and its binary data. Never a pickle: a malicious file may control the other end."""
    connection.send_bytes(json.dumps(message).encode())
    connection.send_bytes(payload)


def receive(connection: Connection) -> tuple[dict[str, Any], bytes]:
    """The next message; EOFError or OSError when there is none."""
    return json.loads(connection.recv_bytes(MEMORY_BYTES)), connection.recv_bytes(MEMORY_BYTES)


def _running_child() -> tuple[subprocess.Popen[bytes], Connection]:
    global _child
    if _child is not None and _child[0].poll() is None:
        return _child
    stop()
    environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    # Each of these would reserve address space far beyond what it uses.
    environment |= {"MALLOC_ARENA_MAX": "2", "ARROW_DEFAULT_MEMORY_POOL": "system", "ARROW_IO_THREADS": "2"}
    environment |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    ours, theirs = socket.socketpair()
    with theirs:
        stdin = theirs.fileno()
        process = subprocess.Popen(
            [*_COMMAND, str(MEMORY_BYTES)], stdin=stdin, stdout=2, env=environment, start_new_session=True
        )
    _child = process, Connection(ours.detach())
    try:
        receive(_child[1])
    except (EOFError, OSError):
        raise ExplainedError(
            f"The process that reads untrusted data does not start: it ended with {_shown(process.wait())}."
        ) from None
    return _child


def _shown(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit status {code}"
