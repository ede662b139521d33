"""Which data made a model, and where an image is used: answered from stored manifests alone."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from cifar_assets.contracts import CLASSES
from cifar_assets.dataset.objects import RawObject
from cifar_assets.dataset.stores import Stores
from cifar_assets.dataset.versions.processed import list_processed_versions, read_processed
from cifar_assets.dataset.versions.raw import read_provenance, read_raw
from cifar_assets.dataset.versions.reader import open_split
from cifar_assets.dataset.versions.splits import SPLIT_NAMES, SplitName
from cifar_assets.model_package import MANIFEST_FILE, ModelManifest, read_manifest
from resources.errors import ConfigError
from resources.object_store import ObjectStore


@dataclass(frozen=True)
class UsedObject:
    """A raw object and how many of its images each split took."""

    item: RawObject
    landed_as: tuple[str, ...]
    images: dict[SplitName, int]


@dataclass(frozen=True)
class DatasetLineage:
    """A processed version and all that it was made from."""

    processed_digest: str
    raw_digest: str
    source: str
    objects: tuple[UsedObject, ...]


@dataclass(frozen=True)
class ImageOrigin:
    """One image of a processed version: label, and the object and row it came from."""

    processed_digest: str
    split: SplitName
    position: int
    pixel_digest: str
    label: str
    object_key: str
    row: int


@dataclass(frozen=True)
class Changes:
    """What differs between two processed versions, in images per split."""

    added: dict[SplitName, int]
    removed: dict[SplitName, int]
    moved: int
    """Images that changed their split: not possible between versions of one split configuration."""
    relabelled: int


def model_lineage(stores: Stores, model_digest: str) -> tuple[ModelManifest, DatasetLineage]:
    """The model's manifest and the data that made it."""
    manifest = read_manifest(stores.models.at(model_digest), model_digest)
    return manifest, dataset_lineage(stores, manifest.dataset_digest)


def dataset_lineage(stores: Stores, processed_digest: str) -> DatasetLineage:
    """Which objects a processed version was made from, and how many images of each went into which split.

    Raises ObjectNotFoundError that names the first link that is not stored any more.
    """
    manifest = read_processed(stores.processed, processed_digest)
    raw = read_raw(stores.raw, manifest.raw_digest)
    provenance = read_provenance(stores.raw, manifest.raw_digest)
    landed = provenance.get("landed")
    names: dict[str, list[str]] = landed if isinstance(landed, dict) else {}
    counts = {
        split: np.bincount(open_split(stores.processed, processed_digest, split).objects, minlength=len(raw.objects))
        for split in SPLIT_NAMES
    }
    objects = tuple(
        UsedObject(
            item, tuple(names.get(item.sha256, ())), {split: int(counts[split][number]) for split in SPLIT_NAMES}
        )
        for number, item in enumerate(raw.objects)
    )
    return DatasetLineage(processed_digest, manifest.raw_digest, str(provenance.get("source", "unknown")), objects)


def images_of(
    stores: Stores, processed_digest: str, split: SplitName, pixel_digest: str | None = None
) -> Iterator[ImageOrigin]:
    """The images of a split in stored order, or those of one pixel digest, with their exact object and row."""
    rows = open_split(stores.processed, processed_digest, split)
    positions: Iterable[int] = range(len(rows))
    if pixel_digest is not None:
        positions = np.flatnonzero((rows.digests == _binary(pixel_digest)).all(axis=1)).tolist()
        if not positions:
            return
    objects = read_raw(stores.raw, read_processed(stores.processed, processed_digest).raw_digest).objects
    for position in positions:
        yield ImageOrigin(
            processed_digest,
            split,
            position,
            rows.digest(position),
            CLASSES[int(rows.labels[position])],
            objects[int(rows.objects[position])].key,
            int(rows.rows[position]),
        )


def find_image(stores: Stores, pixel_digest: str) -> list[ImageOrigin]:
    """Every place where a processed version uses the image."""
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
    now, before = _placed(processed, digest), _placed(processed, previous)
    both = now.keys() & before.keys()
    added = Counter(now[key][0] for key in now.keys() - both)
    removed = Counter(before[key][0] for key in before.keys() - both)
    return Changes(
        {split: added[split] for split in SPLIT_NAMES},
        {split: removed[split] for split in SPLIT_NAMES},
        moved=sum(now[key][0] != before[key][0] for key in both),
        relabelled=sum(now[key][1] != before[key][1] for key in both),
    )


def _placed(processed: ObjectStore, digest: str) -> dict[bytes, tuple[SplitName, int]]:
    """Split and label by pixel digest."""
    placed: dict[bytes, tuple[SplitName, int]] = {}
    for split in SPLIT_NAMES:
        rows = open_split(processed, digest, split)
        data = rows.digests.tobytes()
        for position, label in enumerate(rows.labels.tolist()):
            placed[data[32 * position : 32 * position + 32]] = (split, label)
    return placed


def _binary(pixel_digest: str) -> np.ndarray:
    if len(pixel_digest) != 64 or set(pixel_digest) - set("0123456789abcdef"):
        raise ConfigError(f"{pixel_digest!r} is not a pixel digest: expected 64 hexadecimal digits, or an image file.")
    return np.frombuffer(bytes.fromhex(pixel_digest), np.uint8)
