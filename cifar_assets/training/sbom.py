"""The software bill of materials of a model: the packages of the environment that trained it."""

import importlib.metadata
import platform
import re
from typing import Any
from urllib.parse import quote


def build_sbom(model: str, digest: str) -> dict[str, Any]:
    """A CycloneDX 1.6 document (https://cyclonedx.org/docs/1.6/json), equal in equal environments."""
    versions = {}
    for found in importlib.metadata.distributions():
        if found.name:
            versions.setdefault(re.sub(r"[-_.]+", "-", found.name).lower(), found.version)  # the first is imported
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {"type": "machine-learning-model", "name": model, "version": digest},
        },
        "components": [
            {"type": "platform", "name": "python", "version": platform.python_version()},
            *(
                {"type": "library", "name": name, "version": version, "purl": f"pkg:pypi/{name}@{quote(version)}"}
                for name, version in sorted(versions.items())
            ),
        ],
    }
