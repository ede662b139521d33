"""Versions and lineage on the command line: `python -m cifar_assets.dataset --help`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cifar_assets.dataset.formats.images import pixel_digest, prepare_image
from cifar_assets.dataset.stores import Stores, add_store_option, open_stores
from cifar_assets.dataset.versions.lineage import (
    DatasetLineage,
    dataset_lineage,
    find_image,
    find_object,
    images_of,
    model_lineage,
    models_by_dataset,
)
from cifar_assets.dataset.versions.raw import list_raw_versions, make_current
from cifar_assets.dataset.versions.splits import SPLIT_NAMES
from resources.errors import ExplainedError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0, or 1 with one line on stderr."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(open_stores(options.store), options)
    except (ExplainedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m cifar_assets.dataset", description=__doc__)
    add_store_option(parser)
    commands = parser.add_subparsers(required=True, metavar="command")

    command = commands.add_parser("versions", help="list the raw versions, oldest first")
    command.set_defaults(run=_versions)

    command = commands.add_parser("use", help="make an earlier raw version current")
    command.add_argument("digest", help="its digest, or enough of its first digits")
    command.set_defaults(run=_use)

    command = commands.add_parser("model", help="which data made this model")
    command.add_argument("digest", help="model digest, as in a served answer or in the asset's metadata")
    command.add_argument("--images", action="store_true", help="list every image with its object and row")
    command.set_defaults(run=_model)

    command = commands.add_parser("dataset", help="which objects made this processed version")
    command.add_argument("digest", help="processed digest")
    command.add_argument("--images", action="store_true", help="list every image with its object and row")
    command.set_defaults(run=_dataset)

    command = commands.add_parser("where", help="where an image is used: versions, splits, objects, models")
    command.add_argument("image", help="an image file, or a pixel digest")
    command.set_defaults(run=_where)

    command = commands.add_parser("object", help="which versions and models a raw object went into")
    command.add_argument("sha256", help="digest of the object, or of an image file that landed on its own")
    command.set_defaults(run=_object)
    return parser


def _versions(stores: Stores, options: argparse.Namespace) -> int:
    for version in list_raw_versions(stores.raw):
        mark = "*" if version.is_current else " "
        _say(
            f"{mark} {version.digest}  {version.created}  {version.rows:,} images ({version.landed_rows:,} landed)  "
            f"{version.source}"
        )
    return 0


def _use(stores: Stores, options: argparse.Namespace) -> int:
    found = [version.digest for version in list_raw_versions(stores.raw) if version.digest.startswith(options.digest)]
    digest = found[0] if len(found) == 1 else options.digest
    make_current(stores.raw, digest)
    _say(f"Current raw version: {digest}")
    _say("Processing and training take it with the raw_dataset run config `version`.")
    return 0


def _model(stores: Stores, options: argparse.Namespace) -> int:
    manifest, lineage = model_lineage(stores, options.digest)
    _say(f"model      {options.digest} (seed {manifest.seed})")
    _show_dataset(stores, lineage, options.images)
    return 0


def _dataset(stores: Stores, options: argparse.Namespace) -> int:
    _show_dataset(stores, dataset_lineage(stores, options.digest), options.images)
    return 0


def _show_dataset(stores: Stores, lineage: DatasetLineage, images: bool) -> None:
    _say(f"processed  {lineage.processed_digest}")
    _say(f"raw        {lineage.raw_digest} (source: {lineage.source})")
    for used in lineage.objects:
        counts = ", ".join(f"{count:,} {split}" for split, count in used.images.items())
        landed = f", landed as {', '.join(used.landed_as)}" if used.landed_as else ""
        _say(f"  {used.item.role} object {used.item.key} ({counts}{landed})")
    if images:
        for split in SPLIT_NAMES:
            for image in images_of(stores, lineage.processed_digest, split):
                _say(
                    f"  {split} {image.position} {image.pixel_digest} {image.label} {image.object_key} row {image.row}"
                )


def _where(stores: Stores, options: argparse.Namespace) -> int:
    path = Path(options.image)
    digest = pixel_digest(prepare_image(path.read_bytes())) if path.is_file() else options.image
    found, models = find_image(stores, digest), models_by_dataset(stores.models)
    _say(f"image {digest}: used in {len(found)} places")
    for image in found:
        trained = ", ".join(models.get(image.processed_digest, ())) or "none"
        _say(f"  {image.split} of processed {image.processed_digest} as {image.label}")
        _say(f"    from {image.object_key} row {image.row}; models: {trained}")
    return 0


def _object(stores: Stores, options: argparse.Namespace) -> int:
    use = find_object(stores, options.sha256)
    for name, digests in (
        ("raw versions", use.raw_versions),
        ("processed versions", use.processed_versions),
        ("models", use.models),
    ):
        _say(f"{name}: {', '.join(digests) or 'none'}")
    return 0


def _say(line: str) -> None:
    print(line)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
