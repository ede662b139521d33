"""`python -m resources.pytorch_job SETTINGS.yaml`: the manifest that the Pipes client would create, for kubectl.

The file holds `name`, `namespace` and `config` (fields of PyTorchJobConfig).
"""

import sys
from typing import Any

from resources.kubernetes.config import print_manifest
from resources.pytorch_job.config import PyTorchJobConfig
from resources.pytorch_job.manifest import build_pytorch_job_manifest

COMMAND = "python -m resources.pytorch_job"


def build(name: str, namespace: str, config: dict[str, Any]) -> dict[str, Any]:
    """The PyTorchJob for a settings file."""
    return build_pytorch_job_manifest(PyTorchJobConfig(**config), name=name, namespace=namespace)


if __name__ == "__main__":
    sys.exit(print_manifest(COMMAND, build, sys.argv[1:]))
