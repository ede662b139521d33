"""Settings: their base class, and the manifests made of files of them."""

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


class StrictConfig(dg.Config):
    """Settings in which an unknown name is an error."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)


def without_secrets(env: dict[str, str]) -> dict[str, str]:
    """The variables as they are. ValueError for one that looks like a credential, which a manifest would show."""
    for name, value in env.items():
        if _SECRET_NAME.search(name) or has_credentials(value):
            raise ValueError(
                f"{name} looks like a credential, which everybody who may read the manifest would see: put it into a "
                "Secret and name that in env_secrets."
            )
    return env


def print_manifest(command: str, build: Callable[..., Mapping[str, Any]], arguments: Sequence[str]) -> int:
    """Print what `build` makes of the fields of the one file named and return 0, or say what is wrong and return 2."""
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
    """YAML of what `build` makes of a settings file. SettingsError for one that is not valid."""
    try:
        manifest = build(**yaml.safe_load(path.read_text()))
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{path}: {error}") from error
    text = yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=1000)
    return f"# Generated from {path.name} by: {command}\n{text}"


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as such."""


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _represent_text)
