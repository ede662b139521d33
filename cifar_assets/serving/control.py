"""How the local deployment's supervisor is found, started, and told what to do.

A folder holds its state: `supervisor.json` (where it listens for commands, and the secret that they must carry;
readable by its owner only), `supervisor.lock` (held while it lives), and the logs.
"""

import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cifar_assets.errors import DeployError
from cifar_assets.serving.worker import Deployment, package_environment

STATE_FILE = "supervisor.json"
LOCK_FILE = "supervisor.lock"
SUPERVISOR_LOG = "supervisor.log"

_MAX_MESSAGE_BYTES = 1 << 20
_START_SECONDS = 60.0
_STOP_SECONDS = 60.0


@dataclass(frozen=True)
class SupervisorState:
    """What a supervisor writes down about itself."""

    pid: int
    control_port: int
    token: str
    host: str
    port: int
    worker_pids: tuple[int, ...] = ()

    @property
    def url(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


def read_state(folder: Path) -> SupervisorState | None:
    """What the folder's last supervisor wrote, whether it still lives or not."""
    try:
        values = json.loads((folder / STATE_FILE).read_text())
        return SupervisorState(**{**values, "worker_pids": tuple(values["worker_pids"])})
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None


def write_state(folder: Path, state: SupervisorState) -> None:
    """Replace the state file, atomically and for the owner's eyes."""
    path = folder / STATE_FILE
    temporary = path.with_suffix(".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(asdict(state), file)
    os.replace(temporary, path)


def is_locked(folder: Path) -> bool:
    """Whether a supervisor of this folder lives, be it ever so busy."""
    try:
        with (folder / LOCK_FILE).open("rb") as file:
            # Shared, so that two who look at the same time do not take each other for a supervisor.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def find_supervisor(folder: Path) -> SupervisorState | None:
    """The folder's living supervisor, None where there is none."""
    return read_state(folder) if is_locked(folder) else None


def start_supervisor(folder: Path, host: str, port: int) -> SupervisorState:
    """The folder's supervisor on the address, started and detached from this process where there is none.

    Raises DeployError when the address belongs to another process, or the supervisor to another address.
    """
    folder = folder.resolve()
    state = _wait_for_state(folder)
    if state is None:  # there is none, or the one there was ending
        _spawn(folder, host, port)
        state = _wait_for_state(folder)
    if state is None:
        raise DeployError(f"The supervisor in {folder} ended while it started. See {folder / SUPERVISOR_LOG}.")
    if (state.host, state.port) != (host, port) and port != 0:
        raise DeployError(
            f"The local deployment in {folder} serves on {state.host}:{state.port}, not on {host}:{port}. "
            f"Ask for that address, or stop it: python -m cifar_assets.serving.local stop --state-dir {folder}"
        )
    return state


def deploy(state: SupervisorState, deployment: Deployment, timeout: float) -> dict[str, Any]:
    """Swap to the deployment; gives the status afterwards. Raises DeployError when the old one was kept."""
    return ask(state, {"command": "deploy", "deployment": asdict(deployment), "timeout": timeout}, timeout + 60)


def status(state: SupervisorState) -> dict[str, Any]:
    """What is served, since when, from which process, and why the last deployment failed if it did."""
    return ask(state, {"command": "status"}, 10)


def stop_supervisor(folder: Path) -> bool:
    """Drain and end the folder's deployment; False where none was running. Returns when it is gone."""
    state = find_supervisor(folder)
    if state is None:
        return False
    ask(state, {"command": "stop"}, _STOP_SECONDS)
    deadline = time.monotonic() + _STOP_SECONDS
    while is_locked(folder):
        if time.monotonic() > deadline:
            raise DeployError(f"The supervisor, process {state.pid}, did not end within {_STOP_SECONDS:g} seconds.")
        time.sleep(0.05)
    return True


def ask(state: SupervisorState, message: dict[str, Any], timeout: float) -> dict[str, Any]:
    """Send one command and read its answer. Raises DeployError where none comes in time, or it is an error."""
    try:
        with socket.create_connection(("127.0.0.1", state.control_port), timeout) as connection:
            connection.sendall(json.dumps({**message, "token": state.token}).encode() + b"\n")
            with connection.makefile("rb") as answers:
                answer = answers.readline(_MAX_MESSAGE_BYTES)
        found = json.loads(answer)
    except (OSError, ValueError) as error:
        raise DeployError(
            f"The supervisor of the local deployment, process {state.pid}, did not answer {message['command']!r}: "
            f"{error}. See its log."
        ) from error
    if "error" in found:
        raise DeployError(found["error"])
    return found


def _spawn(folder: Path, host: str, port: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "cifar_assets.serving.supervisor", "--detach"]
    command += ["--state-dir", str(folder), "--host", host, "--port", str(port)]
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=package_environment(),
            timeout=_START_SECONDS,
            start_new_session=True,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DeployError(
            f"The supervisor of the local deployment did not start within {_START_SECONDS:g} s."
        ) from error
    if result.returncode != 0 and not is_locked(folder):  # otherwise another process was faster
        raise DeployError(f"The local deployment did not start: {result.stderr.strip()}")


def _wait_for_state(folder: Path) -> SupervisorState | None:
    """The state of a supervisor that may be starting, written once it takes commands; None when none lives."""
    deadline = time.monotonic() + _START_SECONDS
    while is_locked(folder):
        state = read_state(folder)
        if state is not None and _answers(state):
            return state
        if time.monotonic() > deadline:
            raise DeployError(f"The supervisor in {folder} takes no commands. See {folder / SUPERVISOR_LOG}.")
        time.sleep(0.05)
    return None


def _answers(state: SupervisorState) -> bool:
    try:
        return ask(state, {"command": "status"}, 5).get("pid") == state.pid
    except DeployError:
        return False
