"""`python -m resources.inference_service SETTINGS.yaml`: the manifest that a deployment would write, for kubectl.

The file holds `name`, `namespace`, `model` (uri, digest, version) and `settings` (fields of InferenceServiceSettings).
"""

import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from resources.inference_service.interface import DeployRequest
from resources.inference_service.kserve.config import InferenceServiceSettings
from resources.inference_service.kserve.manifest import build_inference_service_manifest
from resources.kubernetes.config import print_rendered
from resources.kubernetes.errors import SettingsError

_KEYS = {"name", "namespace", "model", "settings"}
_MODEL_KEYS = {"uri", "digest", "version"}


def render(path: Path) -> str:
    """YAML of the InferenceService that a settings file describes. SettingsError for one that is not valid."""
    content: Any = yaml.safe_load(path.read_text())
    if not isinstance(content, dict) or set(content) != _KEYS or set(content["model"]) != _MODEL_KEYS:
        raise SettingsError(
            f"{path}: expected the keys {', '.join(sorted(_KEYS))}, and in model {', '.join(sorted(_MODEL_KEYS))}."
        )
    model = content["model"]
    try:
        settings = InferenceServiceSettings(**content["settings"])
    except ValidationError as error:
        raise SettingsError(f"{path}: {error}") from error
    request = DeployRequest(model["uri"], model["digest"], str(model["version"]))
    manifest = build_inference_service_manifest(settings, request, name=content["name"], namespace=content["namespace"])
    source = f"# Generated from {path.name} by: python -m resources.inference_service {_shown(path)}\n"
    return source + yaml.safe_dump(manifest, sort_keys=False)


def _shown(path: Path) -> str:
    """The path as it is from the repository's root."""
    return "/".join(path.parts[-path.parts[::-1].index("k8s") - 1 :]) if "k8s" in path.parts else path.name


def main(arguments: list[str]) -> int:
    """Print the manifest and return 0, or say what is wrong with the settings and return 2."""
    return print_rendered(render, str(__doc__), arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
