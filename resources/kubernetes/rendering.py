"""A command that prints the manifest of a settings file."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from resources.kubernetes.errors import SettingsError


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
