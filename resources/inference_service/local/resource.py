"""The model server as a process of this machine."""

import contextlib
import fcntl
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from pydantic import Field

from resources.errors import ConfigError, DeployError, ExplainedError
from resources.inference_service.client import InferenceClient
from resources.inference_service.interface import (
    DeployedService,
    DeployRequest,
    InferenceServiceResource,
    ServiceStatus,
)
from resources.inference_service.local.process import RunningServer, ServerInfo, find_server, start_server
from resources.sockets import listen

_STOP_SECONDS = 60.0


class LocalInferenceService(InferenceServiceResource):
    """Serves on loopback, from a process that outlives Dagster.

    `python -m resources.inference_service.local status` shows it, `... stop` ends it.
    """

    server_module: str = Field(description="The server: what `python -m` runs, such as `my_project.server`.")
    state_dir: str = Field(default=".cifar/serving", description="Folder of the server's control socket and logs.")
    host: str = Field(default="127.0.0.1", description="Address to listen on; `::` for IPv6 and IPv4.")
    port: int = Field(default=8080, ge=1, le=65535, description="Port to listen on.")
    withheld_prefix: str = Field(
        default="", description="The server gets no variables whose names begin with this: its settings come from here."
    )
    startup_timeout_seconds: float = Field(
        default=120.0, gt=0, description="How long a model may take to load, be verified and warm up."
    )

    def deploy(self, request: DeployRequest) -> DeployedService:
        folder = Path(self.state_dir).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        with _only_deployment(folder), find_server(folder) or contextlib.nullcontext() as old:
            if old is None:
                return _deployed(self._start(folder, request, None), None, changed=True)
            self._check_address(old.info)
            previous = old.info.model_digest
            if (previous, old.info.model_version) == (request.model_digest, request.model_version):
                return _deployed(old.info, previous, changed=False)
            new = self._start(folder, request, old)
            old.wait_until_it_drains()
            return _deployed(new, previous, changed=True)

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

    def _check_address(self, info: ServerInfo) -> None:
        if (info.host, info.port) != (self.host, self.port):
            raise DeployError(
                f"The local deployment in {self.state_dir} serves on {info.host}:{info.port}, not on {self.host}:"
                f"{self.port}. Ask for that address, or stop it: python -m resources.inference_service.local stop "
                f"--state-dir {self.state_dir}"
            )

    def _start(self, folder: Path, request: DeployRequest, old: RunningServer | None) -> ServerInfo:
        """Start a server beside the old one, which drains once the new one answers. DeployError keeps the old one."""
        with contextlib.ExitStack() as stack:
            try:
                listener = old.listener if old else stack.enter_context(_listen(self.host, self.port))
                arguments = folder, request, self.host, self.port, listener, self.startup_timeout_seconds
                new = stack.enter_context(start_server(self.server_module, *arguments, self.withheld_prefix))
                _check_answers(new.info)
                new.take_over(folder, old)
            except (OSError, ExplainedError) as error:
                kept = f"Model {old.info.model_digest} still serves." if old else "Nothing was served before or is now."
                raise DeployError(
                    f"Model {request.model_digest} was not put into service: {str(error).rstrip('.')}. {kept}"
                ) from error
            return new.info


def stop_server(folder: Path) -> bool:
    """Drain and end the folder's server; False where none is running. Returns when it is gone."""
    server = find_server(folder)
    if server is None:
        return False
    with server:
        server.listener.close()
        server.terminate()
        server.wait_until_gone(_STOP_SECONDS)
    return True


@contextlib.contextmanager
def _only_deployment(folder: Path) -> Iterator[None]:
    """Wait for whoever deploys to this folder at the moment."""
    with (folder / "deploy.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _listen(host: str, port: int) -> socket.socket:
    """The socket to listen on. ConfigError names the process that has the port."""
    import psutil

    try:
        return listen(host, port)
    except ConfigError as error:
        with contextlib.suppress(psutil.Error):
            for found in psutil.net_connections("tcp"):
                if found.status == psutil.CONN_LISTEN and getattr(found.laddr, "port", None) == port and found.pid:
                    command = " ".join(psutil.Process(found.pid).cmdline())[:200]
                    raise ConfigError(
                        f"Port {port} of {host} is held by process {found.pid} ({command}), which is not part of "
                        "this local deployment. End that process, or serve on another port."
                    ) from error
        raise


def _check_answers(info: ServerInfo) -> None:
    """Ask the new server over HTTP, where no one else can, before it takes the place of another."""
    client = InferenceClient(f"http://127.0.0.1:{info.private_port}")
    black_and_white = np.stack([np.full(client.image_shape, value, np.uint8) for value in (0, 255)])
    answer = client.predict_arrays(black_and_white)
    if answer.model_digest != info.model_digest:
        raise DeployError(f"expected an answer of model {info.model_digest}, got one of {answer.model_digest}")


def _deployed(info: ServerInfo, previous: str | None, *, changed: bool) -> DeployedService:
    return DeployedService(info.url, info.model_digest, info.model_version, previous, changed, _details(info))


def _details(info: ServerInfo) -> dict[str, str]:
    return {"deployment": "local process", "process_id": str(info.pid), "log_file": info.log_file}
