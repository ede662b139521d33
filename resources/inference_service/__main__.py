"""`python -m resources.inference_service SETTINGS.yaml`: the manifest that a deployment would write, for kubectl.

The file holds `name`, `namespace`, `model` (uri, digest, version) and `settings` (fields of InferenceServiceSettings).
"""

import sys
from typing import Any

from resources.inference_service.interface import DeployRequest
from resources.inference_service.kserve.config import InferenceServiceSettings
from resources.inference_service.kserve.manifest import build_inference_service_manifest
from resources.kubernetes.config import print_manifest

COMMAND = "python -m resources.inference_service"


def build(name: str, namespace: str, model: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The InferenceService for a settings file."""
    fields: dict[str, Any] = {f"model_{key}": str(value) for key, value in model.items()}
    return build_inference_service_manifest(
        InferenceServiceSettings(**settings), DeployRequest(**fields), name=name, namespace=namespace
    )


if __name__ == "__main__":
    sys.exit(print_manifest(COMMAND, build, sys.argv[1:]))
