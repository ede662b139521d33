"""The model server as a process of this machine."""

import contextlib
import fcntl
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from resources.errors import ConfigError, DeployError, ExplainedError
from resources.inference_service.interface import (
    DeployedService,
    DeployRequest,
    InferenceServiceResource,
    ServiceStatus,
)

if TYPE_CHECKING:
    from socket import socket

    from cifar_assets.serving.control import RunningServer, ServerInfo

_ANSWER_SECONDS = 30.0
_NUM_LOGS_KEPT = 20
_OWN_VARIABLES = "CIFAR_SERVING_"


class LocalInferenceService(InferenceServiceResource):
    """Serves on loopback, from a process that outlives Dagster.

    `python -m cifar_assets.serving.local status` shows it, `... stop` ends it.
    """

    state_dir: str = Field(default=".cifar/serving", description="Folder of the server's control socket and logs.")
    host: str = Field(default="127.0.0.1", description="Address to listen on; `::` for IPv6 and IPv4.")
    port: int = Field(default=8080, ge=1, le=65535, description="Port to listen on.")
    startup_timeout_seconds: float = Field(
        default=120.0, gt=0, description="How long a model may take to load, be verified and warm up."
    )

    def deploy(self, request: DeployRequest) -> DeployedService:
        from cifar_assets.serving.control import find_server

        folder = Path(self.state_dir).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        with _only_deployment(folder):
            old = find_server(folder)
            with contextlib.closing(old) if old is not None else contextlib.nullcontext():
                if old is not None:
                    self._check_address(old.info)
                    if (old.info.model_digest, old.info.model_version) == (request.model_digest, request.model_version):
                        return _deployed(old.info, old.info.model_digest, changed=False)
                log_file = self._start(folder, request, old)
            new = find_server(folder)
            if new is None or new.info.model_digest != request.model_digest:
                raise DeployError(f"The server of model {request.model_digest} is gone again. See {log_file}.")
            with contextlib.closing(new):
                _wait_for_answer(new.info)
                return _deployed(new.info, old.info.model_digest if old else None, changed=True)

    def status(self) -> ServiceStatus:
        from cifar_assets.serving.control import find_server
        from resources.inference_service.client import InferenceClient

        url = None
        try:
            server = find_server(Path(self.state_dir))
            if server is None:
                return ServiceStatus(False, None, None, None, f"No model server is running in {self.state_dir}.")
            with contextlib.closing(server):
                info, url = server.info, server.info.url
            served = InferenceClient(url).served_model()
        except ExplainedError as error:
            return ServiceStatus(False, url, None, None, str(error))
        return ServiceStatus(served.ready, url, served.model_digest, served.model_version, None, _details(info))

    def delete(self) -> bool:
        from cifar_assets.serving.local import stop_server

        return stop_server(Path(self.state_dir))

    def _check_address(self, info: "ServerInfo") -> None:
        if (info.host, info.port) != (self.host, self.port):
            raise DeployError(
                f"The local deployment in {self.state_dir} serves on {info.host}:{info.port}, not on {self.host}:"
                f"{self.port}. Ask for that address, or stop it: python -m cifar_assets.serving.local stop "
                f"--state-dir {self.state_dir}"
            )

    def _start(self, folder: Path, request: DeployRequest, old: "RunningServer | None") -> Path:
        """Start a server beside the old one, which leaves once the new one accepts. DeployError keeps the old one."""
        try:
            with contextlib.closing(_bind(self.host, self.port)) if old is None else old.listener as listener:
                server = _NewServer(folder, request, self.host, listener)
                with server.killed_on_failure():
                    server.wait_for("loaded", self.startup_timeout_seconds)
                    server.go()
                    server.wait_for("ready", _ANSWER_SECONDS)
        except (OSError, ExplainedError) as error:
            kept = "Nothing was served before, and nothing is now."
            if old is not None:
                kept = f"Model {old.info.model_digest} still serves."
            reason = str(error).rstrip(".")
            raise DeployError(f"Model {request.model_digest} was not put into service: {reason}. {kept}") from error
        return server.log_file


class _NewServer:
    """A server process on its way into service. It ends by itself when this process ends before `go`."""

    def __init__(self, folder: Path, request: DeployRequest, host: str, listener: "socket"):
        name = f"server-{time.strftime('%Y%m%d-%H%M%S')}-{request.model_digest[:12]}.log"
        self.log_file = folder / name
        report, report_write = os.pipe()
        options = {
            "model-uri": request.model_uri,
            "model-digest": request.model_digest,
            "model-version": request.model_version,
            "annotations": json.dumps(request.annotations()),
            "host": host,
            "fd": str(listener.fileno()),
            "report-fd": str(report_write),
            "control-dir": str(folder),
            "log-file": str(self.log_file),
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        try:
            _remove_old_logs(folder)
            with self.log_file.open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "cifar_assets.serving", *arguments],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    pass_fds=(listener.fileno(), report_write),
                    env=_package_environment(os.environ),
                    start_new_session=True,
                )
        except BaseException:
            os.close(report)
            raise
        finally:
            os.close(report_write)
        self._socket_file = folder / f"serving-{self._process.pid}.sock"
        self._reports = os.fdopen(report, "rb", buffering=0)

    @contextlib.contextmanager
    def killed_on_failure(self) -> Iterator[None]:
        """Leave nothing behind when the block does not end well, an interrupt of the run included."""
        try:
            yield
        except BaseException:
            self._process.kill()
            self._process.wait()
            self._socket_file.unlink(missing_ok=True)
            raise
        finally:
            self._reports.close()
        threading.Thread(target=self._process.wait, daemon=True).start()  # collects it, should this process be there

    def wait_for(self, state: str, timeout: float) -> None:
        """Return once it reports the state. DeployError says why it does not."""
        if not select.select([self._reports], [], [], timeout)[0]:
            raise DeployError(f"it was not {state} within {timeout:g} seconds; its log is {self.log_file}")
        line = self._reports.readline()
        report = json.loads(line) if line else {}
        if report.get("state") == state:
            return
        if report.get("reason"):
            raise DeployError(report["reason"])
        code = self._process.wait()
        raise DeployError(f"it ended with exit code {code}: {self._last_log_line()} (log: {self.log_file})")

    def go(self) -> None:
        """Let it accept requests and take over from the old one."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(b"go\n")

    def _last_log_line(self) -> str:
        lines = self.log_file.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it logged nothing"


@contextlib.contextmanager
def _only_deployment(folder: Path) -> Iterator[None]:
    """Wait for whoever deploys to this folder at the moment."""
    with (folder / "deploy.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _bind(host: str, port: int) -> "socket":
    """The socket to listen on. ConfigError names the process that has the port."""
    from cifar_assets.serving.ports import bind_address, command_line, port_holder

    try:
        listener = bind_address(host, port)
        listener.listen(2048)
        return listener
    except (ConfigError, OSError) as error:
        holder = port_holder(port)
        command = command_line(holder) if holder is not None else None
        if command is None:
            raise ConfigError(str(error)) from error
        raise ConfigError(
            f"Port {port} of {host} is held by process {holder} ({command[:200]}), which is not part of this local "
            "deployment. End that process, or serve on another port"
        ) from error


def _wait_for_answer(info: "ServerInfo") -> None:
    from resources.inference_service.client import InferenceClient, ServerError

    client = InferenceClient(info.url, timeout=5)
    deadline = time.monotonic() + _ANSWER_SECONDS
    found = "no answer"
    while time.monotonic() < deadline:
        try:
            found = client.served_model().model_digest
            if found == info.model_digest:
                return
        except ServerError as error:
            found = str(error)
        time.sleep(0.1)
    raise DeployError(
        f"{info.url} does not answer with model {info.model_digest} though its server, process {info.pid}, is ready: "
        f"{found}. See {info.log_file}."
    )


def _deployed(info: "ServerInfo", previous: str | None, *, changed: bool) -> DeployedService:
    return DeployedService(info.url, info.model_digest, info.model_version, previous, changed, _details(info))


def _details(info: "ServerInfo") -> dict[str, str]:
    return {"deployment": "local process", "process_id": str(info.pid), "log_file": info.log_file}


def _remove_old_logs(folder: Path) -> None:
    for path in sorted(folder.glob("server-*.log"))[:-_NUM_LOGS_KEPT]:
        path.unlink(missing_ok=True)


def _package_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without options of a server, and so extended that a child finds this package in any folder."""
    paths = [
        str(Path(__file__).resolve().parents[2]),
        *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep)),
    ]
    kept = {name: value for name, value in environment.items() if not name.startswith(_OWN_VARIABLES)}
    return {**kept, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
