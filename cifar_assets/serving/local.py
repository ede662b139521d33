"""`python -m cifar_assets.serving.local status|stop`: see and stop the model server that a local run left serving."""

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cifar_assets.contracts import MODEL_NAME
from cifar_assets.errors import CifarError
from cifar_assets.serving.client import InferenceClient
from cifar_assets.serving.control import find_supervisor, status, stop_supervisor

DEFAULT_STATE_DIR = Path(".cifar/serving")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when done, 3 when nothing is running, 1 on an error."""
    parser = argparse.ArgumentParser(prog="python -m cifar_assets.serving.local", description=__doc__)
    parser.add_argument("command", choices=("status", "stop"))
    parser.add_argument("--state-dir", type=Path, default=DEFAULT_STATE_DIR, help="folder of its state and logs")
    options = parser.parse_args(arguments)
    try:
        return _stop(options.state_dir) if options.command == "stop" else _status(options.state_dir)
    except CifarError as error:
        sys.stderr.write(f"{error}\n")
        return 1


def _stop(folder: Path) -> int:
    if not stop_supervisor(folder):
        _write(f"Nothing is running in {folder}.")
        return 3
    _write("Stopped.")
    return 0


def _status(folder: Path) -> int:
    supervisor = find_supervisor(folder)
    if supervisor is None:
        _write(f"Nothing is running in {folder}.")
        return 3
    found = status(supervisor)
    _write(f"Address     {supervisor.url}/v1/models/{MODEL_NAME}")
    _write(f"Supervisor  process {found['pid']}, state and logs in {found['state_dir']}")
    _write_serving(found["serving"], supervisor.url)
    failure = found["last_failure"]
    if failure:
        _write(f"Refused     model {failure['model_digest']} at {_time(failure['at'])}: {failure['reason']}")
    return 0


def _write_serving(serving: dict[str, Any] | None, url: str) -> None:
    if serving is None:
        _write("Model       none")
        return
    _write(f"Model       version {serving['model_version']}, digest {serving['model_digest']}")
    _write(f"From        {serving['model_uri']}")
    _write(f"Worker      process {serving['pid']} since {_time(serving['since'])}, {serving['restarts']} restarts")
    _write(f"Log         {serving['log_file']}")
    for name, value in sorted(serving["annotations"].items()):
        _write(f"{name:<11} {value}")
    try:
        served = InferenceClient(url, timeout=5).served_model()
        _write(f"Answers     ready, digest {served.model_digest}")
    except CifarError as error:
        _write(f"Answers     no: {error}")


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
