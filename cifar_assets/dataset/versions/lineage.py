"""Which data a model was trained on, and where an image is used, derived from stored manifests only."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from cifar_assets.dataset.objects import RawObject
from cifar_assets.dataset.stores import Stores
from cifar_assets.dataset.versions.processed import list_processed_versions, read_processed
from cifar_assets.dataset.versions.raw import read_provenance, read_raw
from cifar_assets.dataset.versions.reader import open_split
from cifar_assets.dataset.versions.splits import SPLIT_NAMES, SplitName
from cifar_assets.model_package import MANIFEST_FILE, ModelManifest, read_manifest
from resources.errors import ConfigError
from resources.object_store import ObjectStore


class UsedObject(NamedTuple):
    """A raw object, the names it landed under, and the number of its images in each split."""

    item: RawObject
    landed_as: list[str]
    images: dict[SplitName, int]


class DatasetLineage(NamedTuple):
    """A processed version and everything it was made from."""

    processed_digest: str
    raw_digest: str
    source: str
    objects: list[UsedObject]


class ImageOrigin(NamedTuple):
    """One image of a processed version: label, and the object and row it came from."""

    processed_digest: str
    split: SplitName
    position: int
    pixel_digest: str
    label: str
    object_key: str
    row: int


class Changes(NamedTuple):
    """The difference between two processed versions, in images per split. A relabeled image is in both counts."""

    added: dict[SplitName, int]
    removed: dict[SplitName, int]


def model_lineage(stores: Stores, model_digest: str) -> tuple[ModelManifest, DatasetLineage]:
    """The model's manifest and the data it was trained on."""
    manifest = read_manifest(stores.models.at(model_digest), model_digest)
    return manifest, dataset_lineage(stores, manifest.dataset_digest)


def dataset_lineage(stores: Stores, processed_digest: str) -> DatasetLineage:
    """The objects that a processed version was made from, with the number of images in each split.

    Raises ObjectNotFoundError naming the first version in the chain that is no longer stored.
    """
    raw_digest = read_processed(stores.processed, processed_digest).raw_digest
    items = read_raw(stores.raw, raw_digest).objects
    provenance = read_provenance(stores.raw, raw_digest)
    counts = {
        split: np.bincount(open_split(stores.processed, processed_digest, split).objects, minlength=len(items))
        for split in SPLIT_NAMES
    }
    objects = [
        UsedObject(
            item, provenance.landed.get(item.sha256, []), {split: int(counts[split][number]) for split in SPLIT_NAMES}
        )
        for number, item in enumerate(items)
    ]
    return DatasetLineage(processed_digest, raw_digest, provenance.source, objects)


def images_of(
    stores: Stores, processed_digest: str, split: SplitName, pixel_digest: str | None = None
) -> Iterator[ImageOrigin]:
    """The images of a split in stored order, or only those with one pixel digest, with their exact object and row."""
    rows = open_split(stores.processed, processed_digest, split)
    positions = np.arange(len(rows))
    if pixel_digest is not None:
        positions = np.flatnonzero((rows.digests == _binary(pixel_digest)).all(axis=1))
    objects = read_raw(stores.raw, rows.manifest.raw_digest).objects if len(positions) else ()
    for position in positions.tolist():
        label, key = rows.manifest.classes[int(rows.labels[position])], objects[int(rows.objects[position])].key
        digest, row = rows.digest(position), int(rows.rows[position])
        yield ImageOrigin(processed_digest, split, position, digest, label, key, row)


def find_image(stores: Stores, pixel_digest: str) -> list[ImageOrigin]:
    """Every use of the image in a processed version."""
    _binary(pixel_digest)
    return [
        origin
        for digest in list_processed_versions(stores.processed)
        for split in SPLIT_NAMES
        for origin in images_of(stores, digest, split, pixel_digest)
    ]


def models_by_dataset(models: ObjectStore) -> dict[str, list[str]]:
    """Digests of the models that were trained on each processed version."""
    found: dict[str, list[str]] = {}
    for info in models.list():
        digest, _, file = info.key.partition("/")
        if file == MANIFEST_FILE:
            found.setdefault(read_manifest(models.at(digest), digest).dataset_digest, []).append(digest)
    return found


def changes_since(processed: ObjectStore, digest: str, previous: str) -> Changes:
    """What changed from the previous processed version to this one, image by image."""
    changes = Changes({}, {})
    for split in SPLIT_NAMES:
        now, before = _labeled_images(processed, digest, split), _labeled_images(processed, previous, split)
        changes.added[split], changes.removed[split] = len(now - before), len(before - now)
    return changes


def _labeled_images(processed: ObjectStore, digest: str, split: SplitName) -> set[bytes]:
    rows = open_split(processed, digest, split)
    labeled = np.column_stack([rows.digests, rows.labels.astype("<i8").view(np.uint8).reshape(-1, 8)])
    return {row.tobytes() for row in labeled}


def _binary(pixel_digest: str) -> np.ndarray:
    if len(pixel_digest) != 64 or set(pixel_digest) - set("0123456789abcdef"):
        raise ConfigError(f"{pixel_digest!r} is not a pixel digest: expected 64 hexadecimal digits, or an image file.")
    return np.frombuffer(bytes.fromhex(pixel_digest), np.uint8)
