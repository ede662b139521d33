"""Remove what nothing needs any more: `python -m cifar_assets.prune --help`. Without --apply it only lists."""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import dagster as dg

from cifar_assets.deployment import resources_for
from cifar_assets.prune.rules import PINS_PREFIX, Policy, find_digests
from cifar_assets.prune.run import Pruner
from cifar_assets.settings import read_settings
from resources.errors import ConfigError, ExplainedError


def main(arguments: Sequence[str] | None = None) -> int:
    """List or remove; 0, or 1 with one line on stderr."""
    options = _parser().parse_args(arguments)
    logging.getLogger("cifar_assets").setLevel(logging.WARNING)
    try:
        found = resources_for(read_settings())
        chosen = {name: found[name] for name in ("object_store", "mlflow", "serving")}
        with find_instance() as instance, dg.build_resources(chosen, instance=instance) as resources:
            if options.pin or options.unpin:
                models = resources.object_store.models
                for digest in options.pin:
                    models.write(_pin_key(digest), json.dumps({"version": 1}).encode())
                for digest in options.unpin:
                    models.delete(_pin_key(digest))
                return 0
            policy = Policy(**{name: getattr(options, name) for name in Policy.model_fields})
            pruner = Pruner(policy, instance, resources.object_store, resources.mlflow, resources.serving)
            report = pruner.run(options.apply, _say)
    except (ExplainedError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    for kind, text in report.by_kind().items():
        _say(f"{kind}: {text}")
    _say(f"{'Removed' if options.apply else 'Nothing was removed. With --apply, this removes'} {report.total}.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m cifar_assets.prune", description=__doc__)
    parser.add_argument("--apply", action="store_true", help="remove it; otherwise it is only listed")
    for name, field in Policy.model_fields.items():
        option, about = f"--{name.replace('_', '-')}", f"{field.description} (default: {field.default})"
        if field.annotation is bool:
            parser.add_argument(option, action="store_true", help=about)
        else:
            parser.add_argument(option, type=type(field.default), default=field.default, help=about)
    for name, about in (("--pin", "never remove this model or data version"), ("--unpin", "remove it like any other")):
        parser.add_argument(name, metavar="DIGEST", action="append", default=[], help=f"{about}, and do nothing else")
    return parser


def find_instance() -> dg.DagsterInstance:
    """The instance of DAGSTER_HOME, or that of the checkout in the working folder."""
    return dg.DagsterInstance.get() if "DAGSTER_HOME" in os.environ else dg.DagsterInstance.from_config(str(Path.cwd()))


def _pin_key(digest: str) -> str:
    if find_digests(digest) != {digest}:
        raise ConfigError(f"{digest!r} is not a digest: expected 64 lower-case hexadecimal digits.")
    return f"{PINS_PREFIX}{digest}"


def _say(line: str) -> None:
    print(line)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
