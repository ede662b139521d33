"""Base of settings."""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import dagster as dg
from pydantic import ConfigDict

from resources.kubernetes.errors import SettingsError
from resources.redaction import has_credentials

_SECRET_NAME = re.compile(r"PASSWORD|PASSWD|SECRET|TOKEN(?!I)|CREDENTIAL|(ACCESS|API|PRIVATE)_?KEY", re.IGNORECASE)
S = TypeVar("S", bound="StrictConfig")


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


def print_rendered(render: Callable[[Path], str], usage: str, arguments: Sequence[str]) -> int:
    """Print what `render` makes of the one file named and return 0, or say what is wrong with it and return 2."""
    if len(arguments) != 1:
        sys.stderr.write(f"{usage}\n")
        return 2
    try:
        sys.stdout.write(render(Path(arguments[0])))
    except (SettingsError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0
