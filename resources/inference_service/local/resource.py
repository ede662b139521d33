"""The model server as a process of this machine."""

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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
from resources.inference_service.local.process import RunningServer, ServerInfo, find_server, start_server, stop_server
from resources.sockets import listen

_IDENTITY = ("host", "port", "model_digest", "model_version")
"""What a server that runs has to have in common with the one asked for to stay."""


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
        info = {
            "host": self.host,
            "port": self.port,
            "model_uri": request.model_uri,
            "model_digest": request.model_digest,
            "model_version": request.model_version,
            "annotations": request.annotations(),
        }
        with _only_deployment(folder), find_server(folder) or contextlib.nullcontext() as old:
            previous = old.info.model_digest if old else None
            if old and all(getattr(old.info, name) == info[name] for name in _IDENTITY):
                return _deployed(old.info, previous, changed=False)
            try:
                return _deployed(self._replace(old, folder, info), previous, changed=True)
            except (OSError, ExplainedError) as error:
                kept = f"Model {previous} still serves." if old else "Nothing was served before or is now."
                raise DeployError(
                    f"Model {request.model_digest} was not put into service: {str(error).rstrip('.')}. {kept}"
                ) from error

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

    def _replace(self, old: RunningServer | None, folder: Path, info: Mapping[str, Any]) -> ServerInfo:
        """Start a server beside the old one, which drains once the new one answers."""
        withheld = self.withheld_prefix or "="  # which is in no name
        variables = {name: value for name, value in os.environ.items() if not name.startswith(withheld)}
        if old and (old.info.host, old.info.port) == (self.host, self.port):
            listening = contextlib.nullcontext(old.listener)
        else:
            listening = listen(self.host, self.port)
        with listening as listener:
            timeout = self.startup_timeout_seconds
            new = start_server(self.server_module, folder, info, listener, variables, timeout, _check_answers)
        with new:
            new.take_over(folder, old)
            return new.info


@contextlib.contextmanager
def _only_deployment(folder: Path) -> Iterator[None]:
    """Wait for whoever deploys to this folder at the moment."""
    with (folder / "deploy.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


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
    return {"deployment": "local process", "process_id": str(info.process_id), "log_file": info.log_file}
