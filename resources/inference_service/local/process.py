"""A server process that outlives the one that starts it, and how the next server takes its place.

A server answers on a Unix socket in the deployment's folder. Whoever connects gets what is known of the server and a
copy of the socket it listens on, then a byte when it stops accepting, and the end of the connection when the process
ends. So there is no state file and no process id to go stale. The folder's owner alone may ask.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from resources.errors import DeployError
from resources.inference_service.interface import DeployRequest
from resources.sockets import http_url

_NAME = "serving.sock"
_STARTING_NAME = "starting.sock"
_MAX_ANSWER_BYTES = 1 << 16
_ANSWER_SECONDS = 10.0
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
    pid: int
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
        self._connection = connection

    def __enter__(self) -> "RunningServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()
        self._connection.close()

    def take_over(self, folder: Path, old: "RunningServer | None") -> None:
        """Let this server take requests, and then the old one drain. DeployError keeps the old one."""
        try:
            self._connection.sendall(b"go\n")
            if not self._connection.recv(1):
                raise ConnectionResetError("it ended")
            os.replace(folder / _STARTING_NAME, folder / _NAME)
        except OSError as error:
            raise DeployError(f"it failed to take over: {error} (log: {self.info.log_file})") from error
        if old is not None:
            old.terminate()

    def terminate(self) -> None:
        """Tell it to accept nothing more, answer what it has, and end. Does nothing where it has ended."""
        with contextlib.suppress(ConnectionResetError, ProcessLookupError):
            ended = select.select([self._connection], [], [], 0)[0] and not self._connection.recv(1, socket.MSG_PEEK)
            if not ended:
                os.kill(self.info.pid, signal.SIGTERM)

    def wait_until_it_drains(self) -> None:
        """Wait until it accepts nothing more."""
        with contextlib.suppress(OSError):
            self._connection.recv(1)

    def wait_until_gone(self, seconds: float) -> None:
        """Wait for the end of a server that is terminating: the connection ends with it."""
        self._connection.settimeout(seconds)
        try:
            while self._connection.recv(1024):
                pass
        except TimeoutError as error:
            raise DeployError(
                f"The model server, process {self.info.pid}, did not end within {seconds:g} seconds. "
                f"See {self.info.log_file}, or end it with `kill {self.info.pid}`."
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


@contextlib.contextmanager
def start_server(
    module: str,
    folder: Path,
    request: DeployRequest,
    host: str,
    port: int,
    listener: socket.socket,
    timeout: float,
    withheld_prefix: str,
) -> Iterator[RunningServer]:
    """A server that is loaded and waits to take over. It gets no variables whose names begin with `withheld_prefix`.

    It is killed when the block fails, and ends by itself when this process dies in the block. Raises DeployError.
    """
    for path in sorted(folder.glob("server-*.log"))[:-_NUM_LOGS_KEPT]:
        path.unlink(missing_ok=True)
    log_file = folder / f"server-{time.strftime('%Y%m%d-%H%M%S')}-{request.model_digest[:12]}.log"
    model = {name: getattr(request, name) for name in ("model_uri", "model_digest", "model_version")}
    info = {"host": host, "port": port, **model, "annotations": request.annotations(), "log_file": str(log_file)}
    with _control_socket(folder) as (control, connection), log_file.open("ab") as log:
        options = {"fd": listener.fileno(), "control_fd": control.fileno(), "control_info": json.dumps(info)}
        arguments = [f"--{name.replace('_', '-')}={value}" for name, value in {**model, **options}.items()]
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(listener.fileno(), control.fileno()),
            env={**_without(withheld_prefix), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,
        )
    try:
        server = _meet(connection, folder / _STARTING_NAME, timeout)
        if server is None:
            lines = log_file.read_text(errors="replace").strip().splitlines() or ["it logged nothing"]
            raise DeployError(f"it ended with exit code {process.wait()}: {lines[-1]} (log: {log_file})")
        with server:
            yield server
    except BaseException:
        process.kill()
        process.wait()
        (folder / _STARTING_NAME).unlink(missing_ok=True)
        raise
    threading.Thread(target=process.wait, daemon=True).start()  # collects it, should this process still be there


def _without(prefix: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not prefix or not name.startswith(prefix)}


@contextlib.contextmanager
def _control_socket(folder: Path) -> Iterator[tuple[socket.socket, socket.socket]]:
    """The new server's Unix socket, and the first connection to it, which stays open."""
    (folder / _STARTING_NAME).unlink(missing_ok=True)
    connection = socket.socket(socket.AF_UNIX)
    try:
        with _short(folder) as path, socket.socket(socket.AF_UNIX) as control:
            control.bind(f"{path}/{_STARTING_NAME}")
            (folder / _STARTING_NAME).chmod(0o600)
            control.listen()
            connection.connect(f"{path}/{_STARTING_NAME}")
            yield control, connection
    except BaseException:
        connection.close()
        (folder / _STARTING_NAME).unlink(missing_ok=True)
        raise


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
