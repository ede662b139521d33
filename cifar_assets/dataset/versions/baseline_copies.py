"""Copies of the current data under the object names of the pipeline that this project replaces."""

import gzip
import io
import logging
import pickle
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

import numpy as np
from numpy.typing import NDArray

from cifar_assets.contracts import BASELINE_PROCESSED_KEY, BASELINE_RAW_KEY, CLASSES
from cifar_assets.dataset.formats.archive import BATCHES, PYTHON_FOLDER
from cifar_assets.dataset.objects import fetched
from cifar_assets.dataset.versions.processed import MANIFEST_FILE, read_processed
from cifar_assets.dataset.versions.raw import read_raw
from cifar_assets.dataset.versions.reader import open_split
from cifar_assets.dataset.versions.splits import SPLIT_NAMES
from resources.object_store import ObjectStore

logger = logging.getLogger(__name__)

_GZIP_LEVEL = 0
"""No compression: level 1 takes longer than all other work of the step and saves 8 %, as images are mostly noise."""
_PROTOCOL = 2  # also readable by Python 2, like the official archive


def write_baseline_copies(raw: ObjectStore, processed: ObjectStore, processed_digest: str) -> None:
    """Write both copies, if the version has the classes and the image size of CIFAR-10."""
    if not read_processed(processed, processed_digest).is_cifar10:
        logger.info("There are no copies for the old pipeline: it reads CIFAR-10's classes at 32x32 only.")
        return
    write_baseline_raw(raw, processed, processed_digest)
    write_baseline_processed(processed, processed_digest)


def write_baseline_raw(raw: ObjectStore, processed: ObjectStore, processed_digest: str) -> str:
    """Store the version's images as an official python archive and return its key.

    If the raw version consists of one official python archive, it is copied unchanged. Otherwise an archive is written
    from the processed images: train and validation in five batches, the test split in one.
    """
    manifest = read_raw(raw, read_processed(processed, processed_digest).raw_digest)
    only = manifest.objects[0] if len(manifest.objects) == 1 else None
    if only is not None and only.format == "archive" and only.key.endswith(".tar.gz") and not only.excluded:
        raw.copy(only.key, BASELINE_RAW_KEY)
        return BASELINE_RAW_KEY
    _write_archive(raw, BASELINE_RAW_KEY, _official_files(processed, processed_digest))
    return BASELINE_RAW_KEY


def _official_files(processed: ObjectStore, digest: str) -> Iterator[tuple[str, bytes]]:
    """The members of an official python archive, one batch in memory at a time."""
    train, validation, test = (open_split(processed, digest, split) for split in SPLIT_NAMES)
    parts = np.array_split(np.arange(len(train) + len(validation)), len(BATCHES) - 1)
    meta = {"num_cases_per_batch": len(parts[0]), "label_names": list(CLASSES), "num_vis": 3072}
    yield f"{PYTHON_FOLDER}/batches.meta", pickle.dumps(meta, _PROTOCOL)
    for name, part in zip(BATCHES, parts, strict=False):
        first, second = part[part < len(train)], part[part >= len(train)] - len(train)
        images = np.concatenate([train.take(first), validation.take(second)])
        labels = np.concatenate([train.labels[first], validation.labels[second]])
        yield f"{PYTHON_FOLDER}/{name}", _batch(name, images, labels)
    yield f"{PYTHON_FOLDER}/test_batch", _batch("test_batch", test.images, test.labels)


def write_baseline_processed(processed: ObjectStore, processed_digest: str) -> str:
    """Store the version's manifest and files as one archive and return its key."""
    manifest = read_processed(processed, processed_digest)

    def files() -> Iterator[tuple[str, bytes]]:
        yield MANIFEST_FILE, processed.read_verified(f"{processed_digest}/{MANIFEST_FILE}", processed_digest)
        for shard in manifest.files:
            with fetched(processed, shard.key(processed_digest), shard.sha256) as path:
                yield shard.file, path.read_bytes()

    _write_archive(processed, BASELINE_PROCESSED_KEY, files())
    return BASELINE_PROCESSED_KEY


def _write_archive(store: ObjectStore, key: str, files: Iterator[tuple[str, bytes]]) -> None:
    with tempfile.TemporaryDirectory(prefix="cifar-archive-") as folder:
        path = Path(folder, "archive.tar.gz")
        # No name and no timestamp in the gzip header: equal content gives equal bytes.
        with (
            path.open("wb") as file,
            gzip.GzipFile("", "wb", _GZIP_LEVEL, file, mtime=0) as packed,
            tarfile.open(fileobj=cast(IO[bytes], packed), mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            for name, data in files:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        store.upload(key, path)


def _batch(name: str, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> bytes:
    fields = {
        "batch_label": name,
        "labels": labels.tolist(),
        "data": np.ascontiguousarray(images).reshape(len(images), -1),
        "filenames": [f"{CLASSES[int(label)]}_{number:06d}.png" for number, label in enumerate(labels)],
    }
    return pickle.dumps(fields, _PROTOCOL)
