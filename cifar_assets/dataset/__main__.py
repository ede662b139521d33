"""Versions and lineage on the command line: `python -m cifar_assets.dataset --help`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cifar_assets.dataset.formats.images import pixel_digest, prepare_image
from cifar_assets.dataset.stores import Stores, add_store_option, open_stores
from cifar_assets.dataset.versions.lineage import (
    dataset_lineage,
    find_image,
    images_of,
    model_lineage,
    models_by_dataset,
)
from cifar_assets.dataset.versions.raw import list_raw_versions, make_current
from cifar_assets.dataset.versions.splits import SPLIT_NAMES
from resources.errors import ExplainedError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0, or 1 with one line on stderr."""
    parser = argparse.ArgumentParser("python -m cifar_assets.dataset", description=__doc__)
    add_store_option(parser)
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, run, purpose, argument in _COMMANDS:
        command = commands.add_parser(name, help=purpose)
        command.set_defaults(run=run)
        if argument:
            command.add_argument("argument", metavar=argument[0], help=argument[1])
        if run in (_model, _dataset):
            command.add_argument("--images", action="store_true", help="list every image with its object and row")
    options = parser.parse_args(arguments)
    try:
        options.run(open_stores(options.store), options)
    except (ExplainedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


def _versions(stores: Stores, options: argparse.Namespace) -> None:
    for version in list_raw_versions(stores.raw):
        mark, rows = "*" if version.is_current else " ", f"{version.rows:,} images ({version.landed_rows:,} landed)"
        _say(f"{mark} {version.digest}  {version.created}  {rows}  {version.source}")


def _use(stores: Stores, options: argparse.Namespace) -> None:
    digests = [version.digest for version in list_raw_versions(stores.raw)]
    found = [digest for digest in digests if digest.startswith(options.argument)]
    digest = found[0] if len(found) == 1 else options.argument
    make_current(stores.raw, digest)
    _say(f"Current raw version: {digest}")
    _say("Processing and training take it with the raw_dataset run config `version`.")


def _model(stores: Stores, options: argparse.Namespace) -> None:
    manifest, lineage = model_lineage(stores, options.argument)
    _say(f"model      {options.argument} (seed {manifest.seed})")
    options.argument = lineage.processed_digest
    _dataset(stores, options)


def _dataset(stores: Stores, options: argparse.Namespace) -> None:
    lineage = dataset_lineage(stores, options.argument)
    _say(f"processed  {lineage.processed_digest}")
    _say(f"raw        {lineage.raw_digest} (source: {lineage.source})")
    for used in lineage.objects:
        counts = ", ".join(f"{count:,} {split}" for split, count in used.images.items())
        landed = f", landed as {', '.join(used.landed_as)}" if used.landed_as else ""
        _say(f"  {used.item.role} object {used.item.key} ({counts}{landed})")
    for split in SPLIT_NAMES if options.images else ():
        for image in images_of(stores, lineage.processed_digest, split):
            _say(f"  {split} {image.position} {image.pixel_digest} {image.label} {image.object_key} row {image.row}")


def _where(stores: Stores, options: argparse.Namespace) -> None:
    path = Path(options.argument)
    digest = pixel_digest(prepare_image(path.read_bytes())) if path.is_file() else options.argument
    found, models = find_image(stores, digest), models_by_dataset(stores.models)
    _say(f"image {digest}: used in {len(found)} places")
    for image in found:
        trained = ", ".join(models.get(image.processed_digest, ())) or "none"
        _say(f"  {image.split} of processed {image.processed_digest} as {image.label}")
        _say(f"    from {image.object_key} row {image.row}; models: {trained}")


def _say(line: str) -> None:
    print(line)  # noqa: T201


_COMMANDS = (
    ("versions", _versions, "list the raw versions, oldest first", None),
    ("use", _use, "make an earlier raw version current", ("digest", "its digest, or enough of its first digits")),
    ("model", _model, "which data made this model", ("digest", "model digest, as in a served answer or in metadata")),
    ("dataset", _dataset, "which objects made this processed version", ("digest", "processed digest")),
    ("where", _where, "where an image is used: versions, models", ("image", "an image file, or a pixel digest")),
)

if __name__ == "__main__":
    sys.exit(main())
