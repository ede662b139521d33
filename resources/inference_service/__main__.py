"""`python -m resources.inference_service SETTINGS.yaml`: the manifest that a deployment would write, for kubectl.

The file holds `name`, `namespace`, `model` (uri, digest, version) and `settings` (fields of InferenceServiceSettings).
"""

import sys
from pathlib import Path

import yaml
from pydantic import ValidationError

from resources.inference_service.interface import DeployRequest
from resources.inference_service.kserve.config import InferenceServiceSettings
from resources.inference_service.kserve.manifest import build_inference_service_manifest
from resources.kubernetes.config import print_rendered
from resources.kubernetes.errors import SettingsError

_KEYS = {"name", "namespace", "settings", "model", "uri", "digest", "version"}


def render(path: Path) -> str:
    """YAML of the InferenceService that a settings file describes. SettingsError for one that is not valid."""
    try:
        content = yaml.safe_load(path.read_text())
        model = content["model"]
        if unknown := {*content, *model} - _KEYS:
            raise KeyError(*sorted(unknown))
        request = DeployRequest(model["uri"], model["digest"], str(model["version"]))
        settings, name, namespace = content["settings"], content["name"], content["namespace"]
        manifest = build_inference_service_manifest(
            InferenceServiceSettings(**settings), request, name=name, namespace=namespace
        )
    except ValidationError as error:
        raise SettingsError(f"{path}: {error}") from error
    except (KeyError, TypeError) as error:
        raise SettingsError(
            f"{path}: expected the keys name, namespace, settings, and model with uri, digest and version ({error!r})."
        ) from error
    # The path as seen from the repository's root, wherever the command runs.
    shown = "/".join(path.parts[-path.parts[::-1].index("k8s") - 1 :]) if "k8s" in path.parts else path.name
    source = f"# Generated from {path.name} by: python -m resources.inference_service {shown}\n"
    return source + yaml.safe_dump(manifest, sort_keys=False)


def main(arguments: list[str]) -> int:
    """Print the manifest and return 0, or say what is wrong with the settings and return 2."""
    return print_rendered(render, str(__doc__), arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
