"""One server process of the local deployment, as its supervisor sees it."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cifar_assets.serving.settings import ENVIRONMENT_PREFIX

_log = logging.getLogger(__name__)

_MAX_REPORT_BYTES = 64 * 1024


@dataclass(frozen=True)
class Deployment:
    """Which model a worker is to serve, and what is worth knowing about it."""

    model_uri: str
    model_digest: str
    model_version: str
    annotations: Mapping[str, str] = field(default_factory=dict)

    @property
    def identity(self) -> tuple[str, str]:
        return self.model_digest, self.model_version


class Worker:
    """A running `python -m cifar_assets.serving` on a socket that the supervisor owns.

    It reports its state over a pipe, and drains by itself when the supervisor is gone.
    """

    def __init__(self, deployment: Deployment, listener_fd: int, log_file: Path):
        self.deployment = deployment
        self.log_file = log_file
        self.started_at = time.time()
        self._changed = threading.Condition()
        self._states: list[str] = []
        self._reason: str | None = None
        report_read, report_write = os.pipe()
        lifeline_read, self._lifeline = os.pipe()
        try:
            self._process = self._spawn(listener_fd, report_write, lifeline_read)
        finally:
            os.close(report_write)
            os.close(lifeline_read)
        threading.Thread(target=self._listen, args=(report_read,), name="worker-reports", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self, timeout: float) -> str | None:
        """None once it accepts requests; otherwise why it does not, after at most `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._states, timeout)
            if "ready" in self._states:
                return None
            if self._reason:
                return self._reason
        if not self._states:
            return f"it was not ready within {timeout:g} seconds; its log is {self.log_file}"
        code = self._process.wait()
        return f"it ended with exit code {code}: {self._last_log_line()} (log: {self.log_file})"

    def drain(self, timeout: float) -> None:
        """Tell it to leave and return once it accepts no more connections."""
        self._signal(signal.SIGTERM)
        with self._changed:
            self._changed.wait_for(lambda: "draining" in self._states or "ended" in self._states, timeout)

    def wait_until_ended(self, timeout: float | None = None) -> int | None:
        """Its exit code, or None where it is still running after `timeout` seconds."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None

    def end(self, timeout: float) -> None:
        """Wait for a draining worker, and kill it when it takes longer."""
        if self.wait_until_ended(timeout) is None:
            _log.warning("Worker %d did not end within %g s: killing it", self.pid, timeout)
            self.kill()

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()

    def is_running(self) -> bool:
        return self._process.poll() is None

    def _spawn(self, listener_fd: int, report_fd: int, lifeline_fd: int) -> "subprocess.Popen[bytes]":
        deployment = self.deployment
        options = {
            "model-uri": deployment.model_uri,
            "model-digest": deployment.model_digest,
            "model-version": deployment.model_version,
            "fd": str(listener_fd),
            "report-fd": str(report_fd),
            "lifeline-fd": str(lifeline_fd),
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
        with self.log_file.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "cifar_assets.serving", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(listener_fd, report_fd, lifeline_fd),
                env=package_environment(),
                start_new_session=True,
            )

    def _listen(self, report_fd: int) -> None:
        with open(report_fd, "rb") as reports:
            while line := reports.readline(_MAX_REPORT_BYTES):
                with contextlib.suppress(ValueError, KeyError):
                    report = json.loads(line)
                    self._note(report["state"], report.get("reason"))
        self._process.wait()
        with contextlib.suppress(OSError):
            os.close(self._lifeline)
        self._note("ended", None)

    def _note(self, state: str, reason: str | None) -> None:
        with self._changed:
            self._states.append(state)
            self._reason = reason or self._reason
            self._changed.notify_all()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def _last_log_line(self) -> str:
        lines = self.log_file.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it logged nothing"


def package_environment() -> dict[str, str]:
    """This process's environment, so extended that a child finds this package whatever folder it starts in."""
    package_parent = str(Path(__file__).resolve().parents[2])
    paths = [package_parent, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    kept = {name: value for name, value in os.environ.items() if name not in _OWN_OPTIONS}
    return {**kept, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


_OWN_OPTIONS = {f"{ENVIRONMENT_PREFIX}{name}" for name in ("FD", "REPORT_FD", "LIFELINE_FD", "HOST", "PORT")}
