"""The model server as a local process that outlives Dagster, and the handover to its successor.

A server listens on a Unix socket in the deployment's folder. A client receives the description of the server and a copy
of its listening socket, then a byte when the server stops accepting, and EOF when the process ends; "leave" makes it
drain. So there is no state file, and no stale process id is ever signaled. Only the folder's owner may connect.
"""

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydantic import Field

from resources.errors import DeployError, ExplainedError
from resources.inference_service.client import InferenceClient
from resources.inference_service.interface import (
    DeployedService,
    DeployRequest,
    InferenceServiceResource,
    ServiceStatus,
)
from resources.sockets import http_url, listen

_NAME = "serving.sock"
_STARTING_NAME = "starting.sock"
_MAX_ANSWER_BYTES = 1 << 16
_ANSWER_SECONDS = 10.0
_STOP_SECONDS = 60.0
_NUM_LOGS_KEPT = 20


@dataclass(frozen=True)
class ServerInfo:
    """Description of a server of the local deployment."""

    host: str
    port: int
    model_uri: str
    model_digest: str
    model_version: str
    annotations: Mapping[str, str]
    log_file: str
    process_id: int
    private_port: int
    """Its port on 127.0.0.1 before it takes requests."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Further options, which a server of an earlier release does not have."""

    @property
    def url(self) -> str:
        return http_url({"0.0.0.0": "127.0.0.1", "::": "localhost"}.get(self.host, self.host), self.port)


@dataclass(frozen=True)
class RunningServer:
    """A running server. `listener` is a copy of its listening socket; close this object to release it."""

    connection: socket.socket
    info: ServerInfo
    listener: socket.socket

    def __enter__(self) -> "RunningServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()
        self.connection.close()

    def take_over(self, folder: Path, old: "RunningServer | None") -> None:
        """Let this server take requests and make the old one leave. On DeployError the old one stays.

        The server does both, so they happen even if this process dies. Returns when the old one has stopped accepting.
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
        """Make it stop accepting, answer its open requests, and exit. Does nothing if it has already exited."""
        with contextlib.suppress(OSError):
            self.connection.sendall(b"leave\n")

    def wait_until_gone(self, seconds: float) -> None:
        """Wait until a terminating server has exited: the connection ends with it."""
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
    """The server of the folder's deployment; None if none is running."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        with _short(folder) as path:
            connection.connect(f"{path}/{_NAME}")
    except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
        connection.close()
        return None
    return _meet(connection, folder / _NAME, _ANSWER_SECONDS)


def stop_server(folder: Path) -> bool:
    """Drain and stop the folder's server; False if none is running. Returns when it has exited."""
    server = find_server(folder)
    if server is None:
        return False
    with server:
        server.listener.close()
        server.leave()
        server.wait_until_gone(_STOP_SECONDS)
    return True


def _meet(connection: socket.socket, name: Path, timeout: float) -> RunningServer | None:
    """Read a server's first message; None if the server is exiting. DeployError for anything else."""
    connection.settimeout(timeout)
    answer: bytes = b""
    descriptors: list[int] = []
    try:
        answer, descriptors, _, _ = socket.recv_fds(connection, _MAX_ANSWER_BYTES, 1)
        if answer:
            return RunningServer(connection, ServerInfo(**json.loads(answer)), socket.socket(fileno=descriptors[0]))
    except ConnectionResetError:
        pass
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        for descriptor in descriptors:
            os.close(descriptor)
        connection.close()
        raise DeployError(
            f"{name} did not respond like a server of this version of the project within {timeout:g} seconds, but with "
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


class LocalInferenceService(InferenceServiceResource):
    """Serves on loopback, from a process that outlives Dagster.

    `python -m resources.inference_service.local status` shows it, `... stop` ends it.
    """

    server_module: str = Field(description="Python module of the server, such as `my_project.server`.")
    state_dir: str = Field(default=".cifar/serving", description="Folder of the server's control socket and logs.")
    host: str = Field(default="127.0.0.1", description="Address to listen on; `::` for IPv6 and IPv4.")
    port: int = Field(default=8080, ge=1, le=65535, description="Port to listen on.")
    withheld_prefixes: list[str] = Field(
        default=[],
        description="Variables with such a prefix are not passed to the server: its settings come from this resource.",
    )
    options: dict[str, str] = Field(default={}, description="Further options of the server, by name.")
    startup_timeout_seconds: float = Field(
        default=120.0, gt=0, description="How long loading, verifying and warming up a model may take."
    )

    def deploy(self, request: DeployRequest) -> DeployedService:
        folder = Path(self.state_dir).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "deploy.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # waits for a concurrent deployment to this folder
            with find_server(folder) or contextlib.nullcontext() as old:
                return self._replace(folder, old, request)

    def status(self) -> ServiceStatus:
        url = None
        try:
            server = find_server(Path(self.state_dir))
            if server is None:
                return ServiceStatus(False, None, None, None, f"No model server is running in {self.state_dir}.")
            with server:
                info, url = server.info, server.info.url
            served = InferenceClient(url).served_model()
        except ExplainedError as error:
            return ServiceStatus(False, url, None, None, str(error))
        return ServiceStatus(served.ready, url, served.model_digest, served.model_version, None, _details(info))

    def delete(self) -> bool:
        return stop_server(Path(self.state_dir))

    def _replace(self, folder: Path, old: RunningServer | None, request: DeployRequest) -> DeployedService:
        previous = old.info.model_digest if old else None
        listening = None
        if old and (old.info.host, old.info.port) == (self.host, self.port):
            served = (previous, old.info.model_version, old.info.options)
            if served == (request.model_digest, request.model_version, {**self.options, **request.options}):
                return _deployed(old.info, previous, changed=False)
            listening = contextlib.nullcontext(old.listener)
        try:
            with listening or listen(self.host, self.port) as listener, self._start(folder, listener, request) as new:
                _check_answers(new.info)
                new.take_over(folder, old)
                return _deployed(new.info, previous, changed=True)
        except (OSError, ExplainedError) as error:
            kept = (
                f"Model {previous} is still served." if old else "No model was served before, and none is served now."
            )
            raise DeployError(
                f"Model {request.model_digest} was not deployed: {str(error).rstrip('.')}. {kept}"
            ) from error

    def _start(self, folder: Path, listener: socket.socket, request: DeployRequest) -> RunningServer:
        """A loaded server that waits to take over. It exits if its object is closed before that."""
        for path in sorted(folder.glob("server-*.log"))[:-_NUM_LOGS_KEPT]:
            path.unlink(missing_ok=True)
        log_file = folder / f"server-{time.strftime('%Y%m%d-%H%M%S')}-{request.model_digest[:12]}.log"
        starting = folder / _STARTING_NAME
        starting.unlink(missing_ok=True)
        withheld = tuple(self.withheld_prefixes)
        variables = {name: value for name, value in os.environ.items() if not name.startswith(withheld)}
        model = {name: getattr(request, name) for name in ("model_uri", "model_digest", "model_version")}
        info = {**model, "host": self.host, "port": self.port, "annotations": request.annotations()}
        info["options"] = {**self.options, **request.options}
        process = None
        connection = socket.socket(socket.AF_UNIX)
        try:
            with _short(folder) as short, socket.socket(socket.AF_UNIX) as control, log_file.open("ab") as log:
                control.bind(f"{short}/{_STARTING_NAME}")
                starting.chmod(0o600)
                control.listen()
                connection.connect(f"{short}/{_STARTING_NAME}")
                options = {
                    **self.options,
                    **model,
                    **request.options,
                    "fd": listener.fileno(),
                    "control_fd": control.fileno(),
                    "control_info": json.dumps({**info, "log_file": str(log_file)}),
                }
                arguments = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
                process = subprocess.Popen(
                    [sys.executable, "-m", self.server_module, *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(listener.fileno(), control.fileno()),
                    env={**variables, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                    start_new_session=True,
                )
            server = _meet(connection, starting, self.startup_timeout_seconds)
            if server is None:
                lines = log_file.read_text(errors="replace").strip().splitlines() or ["it logged nothing"]
                raise DeployError(f"it ended with exit code {process.wait()}: {lines[-1]} (log: {log_file})")
        except BaseException:
            if process:
                process.kill()
                process.wait()
            connection.close()
            starting.unlink(missing_ok=True)
            raise
        threading.Thread(target=process.wait, daemon=True).start()  # reaps the process if this one is still running
        return server


def _check_answers(info: ServerInfo) -> None:
    """Query the new server over its private HTTP port before it replaces another one."""
    client = InferenceClient(f"http://127.0.0.1:{info.private_port}")
    black_and_white = np.stack([np.full(client.image_shape, value, np.uint8) for value in (0, 255)])
    answer = client.predict_arrays(black_and_white)
    if answer.model_digest != info.model_digest:
        raise DeployError(f"expected a prediction of model {info.model_digest}, got one of {answer.model_digest}")


def _deployed(info: ServerInfo, previous: str | None, *, changed: bool) -> DeployedService:
    return DeployedService(info.url, info.model_digest, info.model_version, previous, changed, _details(info))


def _details(info: ServerInfo) -> dict[str, str]:
    return {"deployment": "local process", "process_id": str(info.process_id), "log_file": info.log_file}
