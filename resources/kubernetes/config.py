"""Base class of settings, and building manifests from settings files."""

import posixpath
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import yaml
from pydantic import ConfigDict

from resources.kubernetes.errors import SettingsError
from resources.redaction import has_credentials

_SECRET_NAME = re.compile(r"PASSWORD|PASSWD|SECRET|TOKEN(?!I)|CREDENTIAL|(ACCESS|API|PRIVATE)_?KEY", re.IGNORECASE)

SUBDOMAIN = re.compile(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_IN_EVERY_POD = ("/", "/dev", "/dev/shm", "/proc", "/sys", "/tmp")


class StrictConfig(dg.Config):
    """Settings in which an unknown name is an error."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


def without_secrets(env: dict[str, str]) -> dict[str, str]:
    """The variables, unchanged. ValueError for one that looks like a credential, which the manifest would expose."""
    for name, value in env.items():
        if _SECRET_NAME.search(name) or has_credentials(value):
            raise ValueError(
                f"{name} looks like a credential, and everybody who can read the manifest would see it: put it into "
                "a Secret and list the Secret in env_secrets."
            )
    return env


def object_names(names: list[str]) -> list[str]:
    """The names of Secrets or ConfigMaps, unchanged. ValueError for one that no such object can have."""
    for name in names:
        if not SUBDOMAIN.fullmatch(name):
            raise ValueError(f"{name!r} is not a DNS subdomain, as the name of a Secret or ConfigMap has to be.")
    return names


def mounts(names: dict[str, str]) -> dict[str, str]:
    """ConfigMaps by folder, unchanged. ValueError for an invalid folder or name."""
    for path in names:
        if not path.startswith("/") or path.startswith("//") or ":" in path or path != posixpath.normpath(path):
            raise ValueError(f"{path!r} is not a folder such as /etc/cifar-ca: absolute, normalized, without ':'.")
        if path in _IN_EVERY_POD:
            raise ValueError(f"{path} is a folder that the pods already have: mount the ConfigMap in one of its own.")
    object_names([*names.values()])
    return names


def print_manifest(command: str, build: Callable[..., Mapping[str, Any]], arguments: Sequence[str]) -> int:
    """Print the manifest that `build` makes from the settings file and return 0, or print an error and return 2."""
    if len(arguments) != 1:
        sys.stderr.write(f"Usage: {command} SETTINGS.yaml\n")
        return 2
    try:
        sys.stdout.write(render_manifest(command, build, Path(arguments[0])))
    except (SettingsError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def render_manifest(command: str, build: Callable[..., Mapping[str, Any]], path: Path) -> str:
    """YAML of the manifest that `build` makes from a settings file. SettingsError for an invalid file."""
    try:
        manifest = build(**yaml.safe_load(path.read_text()))
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{path}: {error}") from error
    text = yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=1000)
    return f"# Generated from {path.name} by: {command}\n{text}"


class _Dumper(yaml.SafeDumper):
    """Writes multi-line strings as YAML block scalars."""


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _represent_text)
