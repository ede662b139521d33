"""`python -m resources.pytorch_job SETTINGS.yaml`: the manifest that the Pipes client would create, for kubectl.

The file holds `name`, `namespace` and `config` (fields of PyTorchJobConfig).
"""

import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from resources.kubernetes.config import print_rendered
from resources.kubernetes.errors import SettingsError
from resources.pytorch_job.config import PyTorchJobConfig
from resources.pytorch_job.manifest import build_pytorch_job_manifest


def render(path: Path) -> str:
    """YAML of the PyTorchJob that a settings file describes. SettingsError for one that is not valid."""
    settings: Any = yaml.safe_load(path.read_text())
    if not isinstance(settings, dict) or set(settings) != {"name", "namespace", "config"}:
        raise SettingsError(f"{path}: expected the keys name, namespace and config.")
    try:
        config = PyTorchJobConfig(**settings["config"])
    except ValidationError as error:
        raise SettingsError(f"{path}: {error}") from error
    manifest = build_pytorch_job_manifest(config, name=settings["name"], namespace=settings["namespace"])
    source = f"# Generated from {path.name} by: python -m resources.pytorch_job k8s/pytorchjob/{path.name}\n"
    return source + yaml.safe_dump(manifest, sort_keys=False)


def main(arguments: list[str]) -> int:
    """Print the manifest and return 0, or say what is wrong with the settings and return 2."""
    return print_rendered(render, str(__doc__), arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
