"""The commands of the docs, which tests run as they stand. Only the images are built elsewhere."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
_IMAGES = 'make images LOAD="minikube image load"\n'
_SECONDS = 1200
"""Far longer than any block takes."""


def blocks(heading: str, page: str = "kubernetes.md") -> list[str]:
    """The shell commands of a section."""
    text = (ROOT / "docs" / page).read_text()
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    return re.findall(r"^```sh\n(.*?)^```", section, re.DOTALL | re.MULTILINE)


_INSTALLATION, DAGSTER, QUERY = blocks("From an empty cluster")
assert _INSTALLATION.startswith(_IMAGES)
INSTALLATION = _INSTALLATION.removeprefix(_IMAGES)
AUTHORITY = blocks("MinIO and MLflow with HTTPS")[0]
(REMOVAL,) = blocks("Cleaning up")


def run(commands: str, folder: Path = ROOT, environment: Mapping[str, str] | None = None) -> str:
    """Output of the commands in one shell, until one fails. What they started in the background ends with the shell."""
    script = f"set -eo pipefail\ntrap 'kill $(jobs -p) 2>/dev/null || true' EXIT\n{commands}"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env={**os.environ, "PATH": path, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20_000:]
    return done.stdout
