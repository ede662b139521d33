"""Versions and lineage on the command line: `python -m cifar_assets.dataset --help`."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cifar_assets.dataset.formats.images import SOURCE_LIMITS, pixel_digest, prepare_image
from cifar_assets.dataset.stores import Stores, add_data_set_option, add_store_option, open_stores
from cifar_assets.dataset.versions.lineage import (
    dataset_lineage,
    find_image,
    images_of,
    model_lineage,
    models_by_dataset,
)
from cifar_assets.dataset.versions.raw import current_raw_digest, list_raw_versions, read_raw
from cifar_assets.dataset.versions.splits import SPLIT_NAMES
from resources.errors import ExplainedError, ObjectNotFoundError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0, or 1 with one line on stderr."""
    parser = argparse.ArgumentParser("python -m cifar_assets.dataset", description=__doc__)
    add_store_option(parser)
    add_data_set_option(parser)
    commands = parser.add_subparsers(required=True, metavar="command", dest="command")
    commands.add_parser("versions", help="list the raw versions, oldest first")
    for name, purpose in (
        ("model", "show the data that this model was trained on"),
        ("dataset", "show what this processed version was made from"),
    ):
        command = commands.add_parser(name, help=purpose)
        command.add_argument("digest", help=f"{name} digest, as in metadata")
        command.add_argument("--images", action="store_true", help="list every image with its object and row")
    command = commands.add_parser("where", help="show the versions and models that use an image")
    command.add_argument("image", help="an image file, or a pixel digest")
    options = parser.parse_args(arguments)
    try:
        lines = list(_answer(open_stores(options.store, options.data_set), options))
    except (ExplainedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    print("\n".join(lines))  # noqa: T201
    return 0


def _answer(stores: Stores, options: argparse.Namespace) -> Iterator[str]:
    if options.command == "versions":
        current = current_raw_digest(stores.raw)
        for digest, (manifest, provenance) in list_raw_versions(stores.raw).items():
            mark = "*" if digest == current else " "
            rows = f"{manifest.rows:,} images ({manifest.landed_rows:,} landed)"
            yield f"{mark} {digest}  {provenance.created}  {rows}  {provenance.source}"
    elif options.command == "model":
        manifest, lineage = model_lineage(stores, options.digest)
        yield f"model      {options.digest} (seed {manifest.seed})"
        if manifest.start_weights:
            of = (
                f"model {manifest.start_model}"
                if manifest.start_model
                else f"a file with sha256 {manifest.start_weights}"
            )
            yield f"start      {of}"
        yield from _dataset(stores, lineage.processed_digest, options.images)
    elif options.command == "dataset":
        yield from _dataset(stores, options.digest, options.images)
    else:
        yield from _where(stores, options.image)


def _dataset(stores: Stores, digest: str, with_images: bool) -> Iterator[str]:
    lineage = dataset_lineage(stores, digest)
    yield f"processed  {lineage.processed_digest}"
    yield f"raw        {lineage.raw_digest} (source: {lineage.source})"
    for used in lineage.objects:
        counts = ", ".join(f"{count:,} {split}" for split, count in used.images.items())
        landed = f", landed as {', '.join(used.landed_as)}" if used.landed_as else ""
        yield f"  {used.item.role} object {used.item.key} ({counts}{landed})"
    for split in SPLIT_NAMES if with_images else ():
        for image in images_of(stores, digest, split):
            yield f"  {split} {image.position} {image.pixel_digest} {image.label} {image.object_key} row {image.row}"


def _where(stores: Stores, image: str) -> Iterator[str]:
    path = Path(image)
    digest = pixel_digest(_prepared(stores, path)) if path.is_file() else image
    found, models = find_image(stores, digest), models_by_dataset(stores.models)
    yield f"image {digest}: used in {len(found)} places"
    for origin in found:
        trained = ", ".join(models.get(origin.processed_digest, ())) or "none"
        yield f"  {origin.split} of processed {origin.processed_digest} as {origin.label}"
        yield f"    from {origin.object_key} row {origin.row}; models: {trained}"


def _prepared(stores: Stores, path: Path) -> NDArray[np.uint8]:
    """The picture as in the current version."""
    current = current_raw_digest(stores.raw)
    if current is None:
        raise ObjectNotFoundError(f"There is no raw version in {stores.raw.uri()}: materialize the raw dataset.")
    images = read_raw(stores.raw, current)
    return prepare_image(path.read_bytes(), images.image_size, images.fit, limits=SOURCE_LIMITS)


if __name__ == "__main__":
    sys.exit(main())
