"""`python -m resources.inference_service SETTINGS.yaml`: the manifest that a deployment would write, for kubectl.

The file holds `name`, `namespace`, `model` (uri, digest, version) and `settings` (fields of InferenceServiceSettings).
"""

import sys
from typing import Any

from resources.inference_service.interface import DeployRequest
from resources.inference_service.kserve.config import InferenceServiceSettings
from resources.inference_service.kserve.manifest import build_inference_service_manifest
from resources.kubernetes.config import print_manifest
from resources.kubernetes.errors import SettingsError

COMMAND = "python -m resources.inference_service"


def build(name: str, namespace: str, model: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The InferenceService for a settings file."""
    fields: dict[str, Any] = {f"model_{key}": str(value) for key, value in model.items()}
    parsed = InferenceServiceSettings(**settings)
    if parsed.canary_percent and not parsed.serverless:
        raise SettingsError("canary_percent needs mode Knative, or a deployment by Dagster, which splits requests.")
    return build_inference_service_manifest(parsed, DeployRequest(**fields), name=name, namespace=namespace)


if __name__ == "__main__":
    sys.exit(print_manifest(COMMAND, build, sys.argv[1:]))
