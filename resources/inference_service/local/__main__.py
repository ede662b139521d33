"""`python -m resources.inference_service.local status|stop`: show or stop the server that a local run has started."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from resources.errors import ExplainedError
from resources.inference_service.client import InferenceClient
from resources.inference_service.local.resource import LocalInferenceService, ServerInfo, find_server, stop_server

_DEFAULT_FOLDER = Path(LocalInferenceService.model_fields["state_dir"].default)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 on success, 3 if nothing is running, 1 on an error."""
    parser = argparse.ArgumentParser(prog="python -m resources.inference_service.local", description=__doc__)
    parser.add_argument("command", choices=("status", "stop"))
    parser.add_argument("--state-dir", type=Path, default=_DEFAULT_FOLDER, help="folder of its control socket and logs")
    options = parser.parse_args(arguments)
    text = "Stopped."
    try:
        if options.command == "stop":
            stopped = [stop_server(folder) for folder in (options.state_dir, *_folders_below(options.state_dir))]
            found = any(stopped)
        elif found := find_server(options.state_dir):
            with found:
                text = _describe(found.info)
    except ExplainedError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write((text if found else f"Nothing is running in {options.state_dir}.") + "\n")
    return 0 if found else 3


def _folders_below(folder: Path) -> list[Path]:
    """Those of further deployments of the same project."""
    return sorted(path for path in folder.glob("*/") if path.is_dir())


def _describe(info: ServerInfo) -> str:
    client = InferenceClient(info.url, timeout=5)
    try:
        answers = f"{client.model_name}, digest {client.served_model().model_digest}"
    except ExplainedError as error:
        answers = f"no: {error}"
    lines = {
        "Address": info.url,
        "Answers": answers,
        "Model": f"version {info.model_version}, digest {info.model_digest}",
        "From": info.model_uri,
        "Process": info.process_id,
        "Log": info.log_file,
        **info.annotations,
    }
    return "\n".join(f"{name:<18} {value}" for name, value in lines.items())


if __name__ == "__main__":
    sys.exit(main())
