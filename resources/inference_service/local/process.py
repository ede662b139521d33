"""A server process that outlives the one that starts it, and how the next server takes its place.

A server answers on a Unix socket in the deployment's folder. Whoever connects gets what is known of the server and a
copy of the socket it listens on, then a byte when it stops accepting, and the end of the connection when the process
ends; "leave" makes it drain. So there is no state file, and no process id that could go stale is ever signaled. The
folder's owner alone may ask.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resources.errors import DeployError
from resources.sockets import http_url

_NAME = "serving.sock"
_STARTING_NAME = "starting.sock"
_MAX_ANSWER_BYTES = 1 << 16
_ANSWER_SECONDS = 10.0
_STOP_SECONDS = 60.0
_NUM_LOGS_KEPT = 20


@dataclass(frozen=True)
class ServerInfo:
    """What is known of a server of the local deployment."""

    host: str
    port: int
    model_uri: str
    model_digest: str
    model_version: str
    annotations: Mapping[str, str]
    log_file: str
    process_id: int
    private_port: int
    """Where it answers on 127.0.0.1 before it takes requests."""

    @property
    def url(self) -> str:
        return http_url({"0.0.0.0": "127.0.0.1", "::": "localhost"}.get(self.host, self.host), self.port)


class RunningServer:
    """A server that answers. `listener` is a copy of its listening socket; close this object to let go of it."""

    def __init__(self, connection: socket.socket, info: ServerInfo, listener: socket.socket):
        self.info = info
        self.listener = listener
        self.connection = connection

    def __enter__(self) -> "RunningServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()
        self.connection.close()

    def take_over(self, folder: Path, old: "RunningServer | None") -> None:
        """Let this server take requests and tell the old one to leave. DeployError keeps the old one.

        The server does both, so that they happen even if this process dies. Returns when the old one has stopped
        accepting.
        """
        names = json.dumps([str(folder / _STARTING_NAME), str(folder / _NAME)]).encode()
        try:
            socket.send_fds(self.connection, [names], [old.connection.fileno()] if old else [])
            if not self.connection.recv(1):
                raise ConnectionResetError("it ended")
        except OSError as error:
            raise DeployError(f"it failed to take over: {error} (log: {self.info.log_file})") from error
        if old:
            with contextlib.suppress(OSError):
                old.connection.recv(1)

    def leave(self) -> None:
        """Tell it to accept nothing more, answer what it has, and end. Does nothing where it has ended."""
        with contextlib.suppress(OSError):
            self.connection.sendall(b"leave\n")

    def wait_until_gone(self, seconds: float) -> None:
        """Wait for the end of a server that is terminating: the connection ends with it."""
        self.connection.settimeout(seconds)
        try:
            while self.connection.recv(1024):
                pass
        except TimeoutError as error:
            raise DeployError(
                f"The model server, process {self.info.process_id}, did not end within {seconds:g} seconds. "
                f"See {self.info.log_file}, or end it with `kill {self.info.process_id}`."
            ) from error
        except ConnectionResetError:
            return


def find_server(folder: Path) -> RunningServer | None:
    """The server that serves the folder's deployment; None where none does."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        with _short(folder) as path:
            connection.connect(f"{path}/{_NAME}")
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        connection.close()
        return None
    return _meet(connection, folder / _NAME, _ANSWER_SECONDS)


def start_server(
    module: str,
    folder: Path,
    info: Mapping[str, Any],
    listener: socket.socket,
    environment: Mapping[str, str],
    timeout: float,
    check: Callable[[ServerInfo], None],
) -> RunningServer:
    """A server that is loaded, passed the check and waits to take over. It ends when its object is closed before that.

    DeployError where it does not come up; it is killed then.
    """
    for path in sorted(folder.glob("server-*.log"))[:-_NUM_LOGS_KEPT]:
        path.unlink(missing_ok=True)
    log_file = folder / f"server-{time.strftime('%Y%m%d-%H%M%S')}-{info['model_digest'][:12]}.log"
    starting = folder / _STARTING_NAME
    starting.unlink(missing_ok=True)
    process = None
    connection = socket.socket(socket.AF_UNIX)
    try:
        with _short(folder) as short, socket.socket(socket.AF_UNIX) as control, log_file.open("ab") as log:
            control.bind(f"{short}/{_STARTING_NAME}")
            starting.chmod(0o600)
            control.listen()
            connection.connect(f"{short}/{_STARTING_NAME}")
            options = {
                **{name: info[name] for name in ("model_uri", "model_digest", "model_version")},
                "fd": listener.fileno(),
                "control_fd": control.fileno(),
                "control_info": json.dumps({**info, "log_file": str(log_file)}),
            }
            process = subprocess.Popen(
                [sys.executable, "-m", module, *(f"--{name.replace('_', '-')}={options[name]}" for name in options)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(listener.fileno(), control.fileno()),
                env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,
            )
        server = _meet(connection, starting, timeout)
        if server is None:
            lines = log_file.read_text(errors="replace").strip().splitlines() or ["it logged nothing"]
            raise DeployError(f"it ended with exit code {process.wait()}: {lines[-1]} (log: {log_file})")
        check(server.info)
    except BaseException:
        if process:
            process.kill()
            process.wait()
        connection.close()
        starting.unlink(missing_ok=True)
        raise
    threading.Thread(target=process.wait, daemon=True).start()  # collects it, should this process still be there
    return server


def stop_server(folder: Path) -> bool:
    """Drain and end the folder's server; False where none is running. Returns when it is gone."""
    server = find_server(folder)
    if server is None:
        return False
    with server:
        server.listener.close()
        server.leave()
        server.wait_until_gone(_STOP_SECONDS)
    return True


def _meet(connection: socket.socket, name: Path, timeout: float) -> RunningServer | None:
    """Read what a server sends first; None for one that ends. DeployError for anything else."""
    connection.settimeout(timeout)
    answer: bytes = b""
    descriptors: list[int] = []
    try:
        answer, descriptors, _, _ = socket.recv_fds(connection, _MAX_ANSWER_BYTES, 1)
        if answer:
            return RunningServer(connection, ServerInfo(**json.loads(answer)), socket.socket(fileno=descriptors[0]))
    except ConnectionResetError:
        pass
    except TimeoutError as error:
        connection.close()
        raise DeployError(f"The server of {name} did not answer within {timeout:g} seconds.") from error
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        for descriptor in descriptors:
            os.close(descriptor)
        connection.close()
        raise DeployError(
            f"{name} belongs to something else, or to a server of another version of this project. It answers "
            f"{answer[:100]!a}. End that process and deploy again."
        ) from error
    connection.close()
    return None


@contextlib.contextmanager
def _short(folder: Path) -> Iterator[str]:
    """A short path to the folder: the address of a Unix socket holds about 100 bytes."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        short = f"/proc/self/fd/{descriptor}"
        yield short if os.path.isdir(short) else str(folder)
    finally:
        os.close(descriptor)
