"""How the processes of the local deployment find each other: a Unix socket in its folder, and no state file.

A server that answers there is alive, and it answers with what it serves and with the socket it listens on, which its
successor takes over. Whoever may write to the folder may ask: it is its owner's alone.
"""

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cifar_assets.serving.ports import http_url
from resources.errors import DeployError

PROTOCOL = 1
"""Version of what is said over the socket."""

_NAME = "serving.sock"
_MAX_ANSWER_BYTES = 1 << 16
_ANSWER_SECONDS = 10.0


@dataclass(frozen=True)
class ServerInfo:
    """What a server of the local deployment says about itself."""

    pid: int
    host: str
    port: int
    model_uri: str
    model_digest: str
    model_version: str
    annotations: dict[str, str] = field(default_factory=dict)
    since: float = 0.0
    log_file: str = ""
    protocol: int = PROTOCOL

    @property
    def url(self) -> str:
        return http_url({"0.0.0.0": "127.0.0.1", "::": "localhost"}.get(self.host, self.host), self.port)


class RunningServer:
    """A server that answers. `listener` is a copy of its listening socket; close this object to let go of it."""

    def __init__(self, connection: socket.socket, info: ServerInfo, listener: socket.socket):
        self.info = info
        self.listener = listener
        self._connection = connection

    def leave(self) -> None:
        """Tell it to accept nothing more, answer what it has, and end. Returns when it accepts nothing more."""
        self._connection.sendall(b"leave\n")
        self._connection.recv(1)

    def wait_until_gone(self, seconds: float) -> None:
        """Wait for the end of a server that was told to leave: with it ends the connection."""
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

    def close(self) -> None:
        self.listener.close()
        self._connection.close()


def find_server(folder: Path) -> RunningServer | None:
    """The server that serves the folder's deployment; None where none does."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(_ANSWER_SECONDS)
    try:
        with _short(folder) as path:
            connection.connect(f"{path}/{_NAME}")
        answer, descriptors, _, _ = socket.recv_fds(connection, _MAX_ANSWER_BYTES, 1)
        if not answer:  # it is on its way out
            connection.close()
            return None
        info = _read_info(folder, answer)
        listener = socket.socket(fileno=descriptors[0])
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError, ConnectionResetError):
        connection.close()
        return None
    except (OSError, IndexError) as error:
        connection.close()
        raise DeployError(f"The model server of {folder} does not answer on {folder / _NAME}: {error}.") from error
    except DeployError:
        connection.close()
        raise
    return RunningServer(connection, info, listener)


def _read_info(folder: Path, answer: bytes) -> ServerInfo:
    try:
        values = json.loads(answer)
        if values["protocol"] == PROTOCOL:
            return ServerInfo(**values)
        protocol, pid = values["protocol"], values["pid"]
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise DeployError(f"{folder / _NAME} belongs to something else: it answers {answer[:100]!a}.") from error
    raise DeployError(
        f"The model server of {folder}, process {pid}, was started by another version of this project (protocol "
        f"{protocol}, not {PROTOCOL}). End it with `kill {pid}` and deploy again."
    )


class ControlSocket:
    """A server's end: under a name of its own until it takes over the deployment."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._name = f"serving-{os.getpid()}.sock"
        self._socket = socket.socket(socket.AF_UNIX)
        self._listener: socket.socket | None = None
        self._kept: list[socket.socket] = []
        try:
            with _short(folder) as path:
                self._socket.bind(f"{path}/{self._name}")
            (folder / self._name).chmod(0o600)
        except OSError as error:
            raise DeployError(f"Cannot make the control socket {folder / self._name}: {error}.") from error
        self._socket.listen(8)

    def take_over(self) -> None:
        """Let the server that served until now leave, and answer in its place."""
        old = find_server(self._folder)
        if old is not None:
            old.leave()
            old.close()
        os.replace(self._folder / self._name, self._folder / _NAME)
        self._name = _NAME

    def serve(self, info: ServerInfo, listener: socket.socket, leave: Callable[[], None]) -> None:
        """Answer in a thread. `leave` returns when the server accepts nothing more."""
        answer = json.dumps(asdict(info)).encode()
        inherited = self._listener = listener.dup()

        def work() -> None:
            with contextlib.suppress(OSError):  # the socket is closed on the way out
                while True:
                    connection, _ = self._socket.accept()
                    threading.Thread(target=obey, args=(connection,), daemon=True).start()

        def obey(connection: socket.socket) -> None:
            with contextlib.suppress(OSError):
                socket.send_fds(connection, [answer], [inherited.fileno()])
                if connection.recv(16) == b"leave\n":
                    leave()
                    self._kept.append(connection)  # open until this process ends, and so its end is seen
                    connection.sendall(b"\n")
                    return
            connection.close()

        threading.Thread(target=work, name="control", daemon=True).start()

    def close(self) -> None:
        """Answer nobody any more."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        if self._listener is not None:
            self._listener.close()


@contextmanager
def _short(folder: Path) -> Iterator[str]:
    """A short path to the folder: the address of a Unix socket holds about 100 bytes."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        short = f"/proc/self/fd/{descriptor}"
        yield short if os.path.isdir(short) else str(folder)
    finally:
        os.close(descriptor)
