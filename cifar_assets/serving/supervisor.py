"""The process that keeps the local deployment alive: it owns the port, and swaps the workers behind it.

Workers share its listening socket. A new one loads, verifies and warms up before it accepts; only then does the old one
stop accepting, answer what it has, and end. So no connection is ever refused, and a new model that does not come up
changes nothing. It outlives the process that started it, restarts a worker that dies, and takes commands on loopback.
"""

import argparse
import contextlib
import fcntl
import hmac
import json
import logging
import os
import secrets
import select
import signal
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from cifar_assets.contracts import EXIT_BAD_SPEC
from cifar_assets.errors import CifarError, ConfigError
from cifar_assets.serving.control import LOCK_FILE, STATE_FILE, SUPERVISOR_LOG, SupervisorState, read_state, write_state
from cifar_assets.serving.ports import bind_address, command_line, port_holder
from cifar_assets.serving.worker import Deployment, Worker

_log = logging.getLogger(__name__)

_DRAIN_SECONDS = 45.0
_STALE_WORKER_SECONDS = 5.0
_FAILED_WORKER_SECONDS = 2.0
_MAX_RESTART_DELAY = 30.0
_NUM_LOGS_KEPT = 20
_STOPPED = "the local deployment is being stopped"
_WITHDRAWN = "whoever asked for it went away before it was up"
_WORKER_MODULE = "cifar_assets.serving"


class Supervisor:
    """The deployment behind one listening socket. Its methods may be called from several threads."""

    def __init__(self, folder: Path, listener: socket.socket):
        self.folder = folder
        self.stopped = threading.Event()
        self._listener = listener
        self._address: tuple[str, int] = listener.getsockname()[:2]
        self._swap = threading.Lock()
        self._current: Worker | None = None
        self._starting: Worker | None = None
        self._restarts = 0
        self._last_failure: dict[str, Any] | None = None
        self._control_port = 0
        self._token = secrets.token_hex(32)
        self.ended = threading.Event()
        """Set when it has been stopped and the last worker is gone."""

    def announce(self, control_port: int) -> None:
        """Write down where commands are taken."""
        self._control_port = control_port
        self._write_state(self._current)

    def handle(self, message: dict[str, Any], is_wanted: Callable[[], bool]) -> dict[str, Any]:
        """Carry out one command and give its answer. `is_wanted` says whether anybody still waits for it."""
        if not hmac.compare_digest(str(message.get("token", "")).encode(), self._token.encode()):
            return {"error": "The command does not carry this supervisor's token."}
        command = message.get("command")
        if command == "status":
            return self.status()
        if command == "deploy":
            return self.deploy(Deployment(**message["deployment"]), float(message["timeout"]), is_wanted)
        if command == "stop":
            self.stop()
            return self.status()
        return {"error": f"Unknown command {command!r}."}

    def status(self) -> dict[str, Any]:
        """Address, current worker and last failure, as JSON values."""
        worker = self._current
        serving = None
        if worker is not None:
            serving = {
                "pid": worker.pid,
                "running": worker.is_running(),
                "model_uri": worker.deployment.model_uri,
                "model_digest": worker.deployment.model_digest,
                "model_version": worker.deployment.model_version,
                "annotations": dict(worker.deployment.annotations),
                "since": worker.started_at,
                "restarts": self._restarts,
                "log_file": str(worker.log_file),
            }
        return {
            "pid": os.getpid(),
            "host": self._address[0],
            "port": self._address[1],
            "state_dir": str(self.folder),
            "serving": serving,
            "last_failure": self._last_failure,
        }

    def deploy(self, deployment: Deployment, timeout: float, is_wanted: Callable[[], bool]) -> dict[str, Any]:
        """Swap to the deployment, or keep what serves and say why in `error`.

        Whoever asked may be cancelled meanwhile; then nothing is swapped.
        """
        with self._swap:
            old = self._current
            if self.stopped.is_set():
                return {"error": f"Model {deployment.model_digest} was not put into service: {_STOPPED}."}
            if old is not None and old.is_running() and old.deployment.identity == deployment.identity:
                return {**self.status(), "changed": False}
            new, reason = self._start(deployment, timeout) if is_wanted() else (None, _WITHDRAWN)
            if new is not None and not is_wanted():
                new.kill()
                new, reason = None, _WITHDRAWN
            if new is None:
                kept = "Nothing was served before, and nothing is now."
                if old is not None:
                    kept = f"Model {old.deployment.model_digest} still serves."
                self._last_failure = {
                    "model_digest": deployment.model_digest,
                    "model_version": deployment.model_version,
                    "reason": reason,
                    "at": time.time(),
                }
                return {
                    "error": f"Model {deployment.model_digest} was not put into service: {_sentence(reason)} {kept}"
                }
            self._restarts = 0
            self._last_failure = None
            self._make_current(new)
            if old is not None:
                self._retire(old)
            previous = old.deployment.model_digest if old is not None else None
            return {**self.status(), "changed": True, "previous_digest": previous}

    def stop(self) -> None:
        """Give up what is being started, drain what serves."""
        self.stopped.set()
        starting = self._starting
        if starting is not None:
            starting.kill()
        with self._swap:
            self._listener.close()
            worker, self._current = self._current, None
            if worker is not None:
                worker.drain(_DRAIN_SECONDS)
                worker.end(_DRAIN_SECONDS)
            self.ended.set()
            _log.info("Stopped")

    def _start(self, deployment: Deployment, timeout: float) -> tuple[Worker | None, str | None]:
        """A worker that accepts requests, or why there is none."""
        log_file = self.folder / f"worker-{time.strftime('%Y%m%d-%H%M%S')}-{deployment.model_digest[:12]}.log"
        worker = Worker(deployment, self._listener.fileno(), log_file)
        _log.info("Started worker %d for model %s, log %s", worker.pid, deployment.model_digest, log_file)
        self._write_state(worker)
        self._starting = worker
        if self.stopped.is_set():  # `stop` may have looked before this worker was known
            worker.kill()
        reason = worker.wait_until_ready(timeout)
        self._starting = None
        if self.stopped.is_set():
            worker.kill()
            reason = _STOPPED
        if reason is not None:
            worker.end(_FAILED_WORKER_SECONDS)
            self._write_state(self._current)
            _log.error("Worker %d did not come up: %s", worker.pid, reason)
            return None, reason
        return worker, None

    def _make_current(self, worker: Worker) -> None:
        self._current = worker
        self._write_state(worker)
        self._remove_old_logs()
        threading.Thread(target=self._watch, args=(worker,), name=f"watch-{worker.pid}", daemon=True).start()
        _log.info("Worker %d serves model %s", worker.pid, worker.deployment.model_digest)

    def _retire(self, worker: Worker) -> None:
        worker.drain(_DRAIN_SECONDS)
        threading.Thread(target=worker.end, args=(_DRAIN_SECONDS,), name=f"end-{worker.pid}", daemon=True).start()

    def _watch(self, worker: Worker) -> None:
        """Replace the worker when it ends though it is the current one. Requests wait in the socket meanwhile."""
        code = worker.wait_until_ended()
        delay = 0.5
        while not self.stopped.is_set():
            with self._swap:
                if self._current is not worker or self.stopped.is_set():
                    return
                _log.error("Worker %d ended with exit code %s: starting it again", worker.pid, code)
                self._restarts += 1
                replacement, _ = self._start(worker.deployment, 120)
                if replacement is not None:
                    self._make_current(replacement)
                    return
            self.stopped.wait(delay)
            delay = min(2 * delay, _MAX_RESTART_DELAY)

    def _write_state(self, newest: Worker | None) -> None:
        host, port = self._address
        pids = tuple({worker.pid for worker in (self._current, newest) if worker is not None})
        write_state(self.folder, SupervisorState(os.getpid(), self._control_port, self._token, host, port, pids))

    def _remove_old_logs(self) -> None:
        for path in sorted(self.folder.glob("worker-*.log"))[:-_NUM_LOGS_KEPT]:
            path.unlink(missing_ok=True)


def _sentence(text: str | None) -> str:
    return f"{(text or 'for an unknown reason').rstrip('.')}."


class _ControlServer(socketserver.ThreadingTCPServer):
    daemon_threads = True

    def __init__(self, supervisor: Supervisor):
        super().__init__(("127.0.0.1", 0), _ControlHandler)
        self.supervisor = supervisor


class _ControlHandler(socketserver.StreamRequestHandler):
    timeout = 10

    def handle(self) -> None:
        assert isinstance(self.server, _ControlServer)
        try:
            message = json.loads(self.rfile.readline(1 << 20))
            answer = self.server.supervisor.handle(message if isinstance(message, dict) else {}, self._is_open)
        except (OSError, ValueError, TypeError, KeyError) as error:
            answer = {"error": f"The command could not be carried out: {type(error).__name__}: {error}"}
            _log.exception("A command failed")
        with contextlib.suppress(OSError):
            self.wfile.write(json.dumps(answer).encode() + b"\n")

    def _is_open(self) -> bool:
        """Whether the other side still holds the connection: its end is readable, as nothing."""
        try:
            readable = select.select([self.connection], [], [], 0)[0]
            return not readable or self.connection.recv(1, socket.MSG_PEEK) != b""
        except OSError:
            return False


def bind(folder: Path, host: str, port: int) -> socket.socket:
    """The listening socket. A worker that a killed supervisor of this folder left behind is waited for, then killed.

    Raises ConfigError that names a foreign process on the port.
    """
    stale = read_state(folder)
    deadline = time.monotonic() + _STALE_WORKER_SECONDS
    while True:
        try:
            listener = bind_address(host, port)
            listener.listen(2048)
            return listener
        except (ConfigError, OSError) as error:
            holder = port_holder(port)
            command = command_line(holder) if holder is not None else None
            if holder is None or command is None:
                raise ConfigError(str(error)) from error
            is_ours = stale is not None and holder in stale.worker_pids and _WORKER_MODULE in command
            if not is_ours:
                raise ConfigError(
                    f"Port {port} of {host} is held by process {holder} ({command[:200]}), which is not part of the "
                    f"local deployment in {folder}. End that process, or serve on another port."
                ) from error
            if time.monotonic() > deadline:
                _log.warning("Killing worker %d, left by supervisor %d", holder, stale.pid if stale else 0)
                os.kill(holder, signal.SIGKILL)
        time.sleep(0.1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the supervisor, in the foreground or detached."""
    parser = argparse.ArgumentParser(prog="python -m cifar_assets.serving.supervisor", description=__doc__)
    parser.add_argument("--state-dir", type=Path, required=True, help="folder of its state and logs")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--detach", action="store_true", help="return once it takes commands, and leave it running")
    options = parser.parse_args(arguments)
    folder = options.state_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if options.detach:
        return _detached(folder, options.host, options.port)
    return _run(folder, options.host, options.port, announce=_announce_in_foreground)


def _run(folder: Path, host: str, port: int, *, announce: Callable[[dict[str, Any]], None]) -> int:
    """Supervise until told to stop. `announce` gets one message: `{}` once commands are taken, or an `error`."""
    with (folder / LOCK_FILE).open("ab") as lock:
        if not _lock(lock):
            announce({"error": f"A supervisor of {folder} is running already."})
            return EXIT_BAD_SPEC
        try:
            listener = bind(folder, host, port)
        except CifarError as error:
            announce({"error": str(error)})
            return EXIT_BAD_SPEC
        supervisor = Supervisor(folder, listener)
        with _ControlServer(supervisor) as control:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: threading.Thread(target=supervisor.stop).start())
            threading.Thread(target=control.serve_forever, name="control", daemon=True).start()
            supervisor.announce(control.server_address[1])
            announce({})
            supervisor.ended.wait()
            time.sleep(0.1)  # for the answer to the stop command to leave
            control.shutdown()
        (folder / STATE_FILE).unlink(missing_ok=True)
    return 0


def _lock(file: BinaryIO) -> bool:
    """Take the lock for good. Somebody who looks whether it is taken holds it for a moment, so try for a while."""
    for _ in range(20):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        else:
            return True
    return False


def _detached(folder: Path, host: str, port: int) -> int:
    """Run the supervisor in a session of its own, child of no process here, and return once it takes commands."""
    read_end, write_end = os.pipe()
    if os.fork():
        os.close(write_end)
        with open(read_end) as answers:
            line = answers.readline()
        answer = json.loads(line) if line else {"error": f"it ended at once; see {folder / SUPERVISOR_LOG}"}
        os.wait()
        if "error" in answer:
            sys.stderr.write(f"{answer['error']}\n")
            return EXIT_BAD_SPEC
        return 0
    os.close(read_end)
    os.setsid()
    if os.fork():
        os._exit(0)
    os.chdir(folder)
    _redirect_output(folder / SUPERVISOR_LOG)

    def announce(message: dict[str, Any]) -> None:
        os.write(write_end, json.dumps(message).encode() + b"\n")
        os.close(write_end)

    code = 1
    try:
        code = _run(folder, host, port, announce=announce)
    except Exception:
        _log.exception("The supervisor failed")
    finally:
        logging.shutdown()
        os._exit(code)


def _redirect_output(log_file: Path) -> None:
    with open(os.devnull, "rb") as nothing, log_file.open("ab") as log:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


def _announce_in_foreground(message: dict[str, Any]) -> None:
    if "error" in message:
        _log.error("%s", message["error"])
    else:
        _log.info("Taking commands")


if __name__ == "__main__":
    sys.exit(main())
