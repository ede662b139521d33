"""`python -m resources.train_job SETTINGS.yaml`: the manifest that the Pipes client would create, for kubectl.

The file holds `name`, `namespace` and `config` (fields of TrainJobConfig).
"""

import sys
from typing import Any

from resources.kubernetes.config import print_manifest
from resources.train_job.config import TrainJobConfig
from resources.train_job.manifest import build_train_job_manifest

COMMAND = "python -m resources.train_job"


def build(name: str, namespace: str, config: dict[str, Any]) -> dict[str, Any]:
    """The TrainJob for a settings file."""
    return build_train_job_manifest(TrainJobConfig(**config), name=name, namespace=namespace)


if __name__ == "__main__":
    sys.exit(print_manifest(COMMAND, build, sys.argv[1:]))
