"""The commands of docs/kubernetes.md that set up and remove the platform. Tests run them as they stand; only the images
are built elsewhere."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
_IMAGES = 'make images LOAD="minikube image load"\n'
_SECONDS = 1200
"""Far longer than any block takes."""


def _first_block(heading: str) -> str:
    """The first shell commands of a section."""
    page = (ROOT / "docs/kubernetes.md").read_text()
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## )", page, re.DOTALL | re.MULTILINE)
    return re.findall(r"^```sh\n(.*?)^```", section, re.DOTALL | re.MULTILINE)[0]


_INSTALLATION = _first_block("From an empty cluster")
assert _INSTALLATION.startswith(_IMAGES)
INSTALLATION = _INSTALLATION.removeprefix(_IMAGES)
REMOVAL = _first_block("Cleaning up")


def run(commands: str) -> None:
    """Runs them in one shell at the repository's root until one fails."""
    done = subprocess.run(
        ["bash", "-ec", commands],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20_000:]
