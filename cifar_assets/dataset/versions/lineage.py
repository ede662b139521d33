"""Which data made a model, and where an image or an object is used: answered from stored manifests alone."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cifar_assets.contracts import CLASSES
from cifar_assets.dataset.objects import RawObject
from cifar_assets.dataset.stores import Stores
from cifar_assets.dataset.versions.processed import list_processed_versions, read_processed
from cifar_assets.dataset.versions.raw import list_raw_versions, read_provenance, read_raw
from cifar_assets.dataset.versions.reader import open_split
from cifar_assets.dataset.versions.splits import SPLIT_NAMES, SplitName
from cifar_assets.model_package import MANIFEST_FILE, read_manifest
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
class ModelLineage:
    """A model and the data that made it."""

    model_digest: str
    seed: int
    dataset: DatasetLineage


@dataclass(frozen=True)
class ImageOrigin:
    """One image of a processed version: label, and the object and row it came from."""

    split: SplitName
    position: int
    pixel_digest: str
    label: str
    object_key: str
    row: int


@dataclass(frozen=True)
class ImageUse:
    """One place where an image is used."""

    processed_digest: str
    origin: ImageOrigin
    models: tuple[str, ...]


@dataclass(frozen=True)
class ObjectUse:
    """Versions and models that a raw object went into."""

    raw_versions: tuple[str, ...]
    processed_versions: tuple[str, ...]
    models: tuple[str, ...]


@dataclass(frozen=True)
class Changes:
    """What differs between two processed versions, in images per split."""

    added: dict[SplitName, int]
    removed: dict[SplitName, int]
    moved: int
    """Images that changed their split: not possible between versions of one split configuration."""
    relabelled: int


def model_lineage(stores: Stores, model_digest: str) -> ModelLineage:
    """Which data made the model. Raises ObjectNotFoundError naming the first link that is not stored any more."""
    manifest = read_manifest(stores.models.at(model_digest), model_digest)
    return ModelLineage(model_digest, manifest.seed, dataset_lineage(stores, manifest.dataset_digest))


def dataset_lineage(stores: Stores, processed_digest: str) -> DatasetLineage:
    """Which objects a processed version was made from, and how many images of each went into which split."""
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
            item,
            tuple(names.get(item.sha256, ())),
            {split: int(counts[split][number]) for split in SPLIT_NAMES},
        )
        for number, item in enumerate(raw.objects)
    )
    source = str(provenance.get("source", "unknown"))
    return DatasetLineage(processed_digest, manifest.raw_digest, source, objects)


def images_of(stores: Stores, processed_digest: str, split: SplitName) -> Iterator[ImageOrigin]:
    """Every image of a split in stored order, with the exact object and row it came from."""
    objects = read_raw(stores.raw, read_processed(stores.processed, processed_digest).raw_digest).objects
    rows = open_split(stores.processed, processed_digest, split)
    for position in range(len(rows.labels)):
        yield ImageOrigin(
            split,
            position,
            rows.digests[position].tobytes().hex(),
            CLASSES[int(rows.labels[position])],
            objects[int(rows.objects[position])].key,
            int(rows.rows[position]),
        )


def find_image(stores: Stores, pixel_digest: str) -> list[ImageUse]:
    """Every processed version that uses the image, in which split, and the models trained on these versions."""
    wanted = _binary(pixel_digest)
    models = _models_by_dataset(stores.models)
    uses = []
    for digest in list_processed_versions(stores.processed):
        objects = None
        for split in SPLIT_NAMES:
            rows = open_split(stores.processed, digest, split)
            for position in np.flatnonzero((rows.digests == wanted).all(axis=1)):
                if objects is None:
                    objects = read_raw(stores.raw, read_processed(stores.processed, digest).raw_digest).objects
                origin = ImageOrigin(
                    split,
                    int(position),
                    pixel_digest,
                    CLASSES[int(rows.labels[position])],
                    objects[int(rows.objects[position])].key,
                    int(rows.rows[position]),
                )
                uses.append(ImageUse(digest, origin, tuple(models.get(digest, ()))))
    return uses


def find_object(stores: Stores, sha256: str) -> ObjectUse:
    """Where a raw object is used. The sha256 is of the object, or of one image file landed on its own."""
    raw_versions = []
    for version in list_raw_versions(stores.raw):
        landed = read_provenance(stores.raw, version.digest).get("landed")
        manifest = read_raw(stores.raw, version.digest)
        if any(item.sha256 == sha256 for item in manifest.objects) or (isinstance(landed, dict) and sha256 in landed):
            raw_versions.append(version.digest)
    processed = [
        digest
        for digest in list_processed_versions(stores.processed)
        if read_processed(stores.processed, digest).raw_digest in raw_versions
    ]
    models = _models_by_dataset(stores.models)
    trained = sorted(model for digest in processed for model in models.get(digest, ()))
    return ObjectUse(tuple(raw_versions), tuple(processed), tuple(trained))


def changes_since(processed: ObjectStore, digest: str, previous: str) -> Changes:
    """What changed from the previous processed version to this one, image by image."""
    now, before = _placed(processed, digest), _placed(processed, previous)
    added: dict[SplitName, int] = dict.fromkeys(SPLIT_NAMES, 0)
    removed: dict[SplitName, int] = dict.fromkeys(SPLIT_NAMES, 0)
    moved = relabelled = 0
    for key, (split, label) in now.items():
        if key not in before:
            added[split] += 1
            continue
        old_split, old_label = before[key]
        moved += split != old_split
        relabelled += label != old_label
    for key, (split, _) in before.items():
        if key not in now:
            removed[split] += 1
    return Changes(added, removed, moved, relabelled)


def _placed(processed: ObjectStore, digest: str) -> dict[bytes, tuple[SplitName, int]]:
    placed: dict[bytes, tuple[SplitName, int]] = {}
    for split in SPLIT_NAMES:
        rows = open_split(processed, digest, split)
        data = rows.digests.tobytes()
        for position, label in enumerate(rows.labels.tolist()):
            placed[data[32 * position : 32 * position + 32]] = (split, label)
    return placed


def _models_by_dataset(models: ObjectStore) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for info in models.list():
        digest, _, file = info.key.partition("/")
        if file == MANIFEST_FILE:
            found.setdefault(read_manifest(models.at(digest), digest).dataset_digest, []).append(digest)
    return found


def _binary(pixel_digest: str) -> np.ndarray:
    if len(pixel_digest) != 64 or set(pixel_digest) - set("0123456789abcdef"):
        raise ConfigError(f"{pixel_digest!r} is no pixel digest: expected 64 hexadecimal digits, or an image file.")
    return np.frombuffer(bytes.fromhex(pixel_digest), np.uint8)
