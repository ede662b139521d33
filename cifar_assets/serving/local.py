"""`python -m cifar_assets.serving.local status|stop`: see and stop the model server that a local run left serving."""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from cifar_assets.contracts import MODEL_NAME
from cifar_assets.serving.control import ServerInfo, find_server
from resources.errors import ExplainedError
from resources.inference_service.client import InferenceClient

DEFAULT_STATE_DIR = Path(".cifar/serving")
_STOP_SECONDS = 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when done, 3 when nothing is running, 1 on an error."""
    parser = argparse.ArgumentParser(prog="python -m cifar_assets.serving.local", description=__doc__)
    parser.add_argument("command", choices=("status", "stop"))
    parser.add_argument(
        "--state-dir", type=Path, default=DEFAULT_STATE_DIR, help="folder of its control socket and logs"
    )
    options = parser.parse_args(arguments)
    try:
        done = stop_server(options.state_dir) if options.command == "stop" else _status(options.state_dir)
    except ExplainedError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    if not done:
        _write(f"Nothing is running in {options.state_dir}.")
        return 3
    if options.command == "stop":
        _write("Stopped.")
    return 0


def stop_server(folder: Path) -> bool:
    """Drain and end the folder's server; False where none is running. Returns when it is gone."""
    server = find_server(folder)
    if server is None:
        return False
    with contextlib.closing(server):
        server.listener.close()
        server.leave()
        server.wait_until_gone(_STOP_SECONDS)
    return True


def _status(folder: Path) -> bool:
    server = find_server(folder)
    if server is None:
        return False
    with contextlib.closing(server):
        _describe(server.info)
    return True


def _describe(info: ServerInfo) -> None:
    since = datetime.fromtimestamp(info.since, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    _write(f"Address     {info.url}/v1/models/{MODEL_NAME}")
    _write(f"Model       version {info.model_version}, digest {info.model_digest}")
    _write(f"From        {info.model_uri}")
    _write(f"Process     {info.pid} since {since}")
    _write(f"Log         {info.log_file}")
    for name, value in sorted(info.annotations.items()):
        _write(f"{name:<11} {value}")
    try:
        served = InferenceClient(info.url, timeout=5).served_model()
        _write(f"Answers     ready, digest {served.model_digest}")
    except ExplainedError as error:
        _write(f"Answers     no: {error}")


def _write(line: str) -> None:
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
