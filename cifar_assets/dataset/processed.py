"""Processed dataset versions: prepared pixels in shards, split by image digest, under one digest."""

import json
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from cifar_assets.contracts import CLASSES
from cifar_assets.dataset.index import PREPARATION, pixel_digests
from cifar_assets.dataset.objects import fetched, is_stored, read_rows
from cifar_assets.dataset.progress import Progress, quiet
from cifar_assets.dataset.raw import RawManifest, read_raw
from cifar_assets.dataset.rows import RowBatch
from cifar_assets.dataset.shards import Rows, Shard, ShardWriter
from cifar_assets.dataset.splits import NEEDED_SPLITS, SPLIT_NAMES, SplitConfig, SplitName, assign_splits
from cifar_assets.digests import canonical_json, sha256_json
from cifar_assets.errors import ConfigError, DataError, IntegrityError, ObjectNotFoundError
from cifar_assets.object_store import ObjectStore

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"


class ProcessedManifest(BaseModel):
    """What a processed version holds. The sha256 of its canonical JSON is the version's digest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["cifar10-processed/1"] = "cifar10-processed/1"
    raw_digest: str
    preparation: int = PREPARATION
    config: SplitConfig
    classes: tuple[str, ...] = CLASSES
    counts: dict[SplitName, dict[str, int]] = Field(description="Images per split and class.")
    mean: tuple[float, float, float] = Field(description="Per channel, of the train split, in units of 0 to 1.")
    std: tuple[float, float, float] = Field(description="Per channel, of the train split, in units of 0 to 1.")
    shards: dict[SplitName, tuple[Shard, ...]] = Field(description="Pixels and labels, in row order.")
    rows: dict[SplitName, Shard] = Field(description="Per split: digest, label, source object and row of each image.")

    @property
    def digest(self) -> str:
        return sha256_json(self.model_dump(mode="json"))

    def count(self, split: SplitName) -> int:
        """Images in a split."""
        return sum(self.counts[split].values())


@dataclass(frozen=True)
class ProcessedReport:
    """How a version was obtained."""

    reused: bool
    """Whether it was there already and nothing was built."""
    size: int
    """Bytes of its shards."""


@dataclass(frozen=True)
class ProcessedVersion:
    """A published processed version."""

    digest: str
    manifest: ProcessedManifest
    report: ProcessedReport


def build_processed(
    raw: ObjectStore,
    processed: ObjectStore,
    raw_digest: str,
    config: SplitConfig | None = None,
    progress: Progress = quiet,
) -> ProcessedVersion:
    """Decode, split and store the images of a raw version; bit-identical for the same raw digest and config.

    Memory is bounded by one shard per split; disk by the finished shards, which become visible all at once. A version
    that was built before is given again without building. Raises DataError when the train or test split would be empty,
    IntegrityError when an object is not what the raw version says.
    """
    config = config or SplitConfig()
    known = _find_built(processed, raw_digest, config)
    if known is not None:
        return known
    manifest = read_raw(raw, raw_digest)
    with tempfile.TemporaryDirectory(prefix="cifar-processed-") as work:
        writers: dict[SplitName, ShardWriter] = {
            split: ShardWriter(Path(work), split, config.max_shard_rows) for split in SPLIT_NAMES
        }
        statistics = ChannelStatistics()
        done = 0
        for rows in _used_rows(raw, manifest):
            names = assign_splits(rows.digests, rows.source_splits, config)
            for position, split in enumerate(SPLIT_NAMES):
                part = rows.take(names == position)
                writers[split].add(part)
                if split == "train":
                    statistics.add(part.images)
            done += len(rows)
            progress("preparing images", done, manifest.rows)
        shards: dict[SplitName, tuple[Shard, ...]] = {split: writer.finish() for split, writer in writers.items()}
        row_files: dict[SplitName, Shard] = {split: writer.write_rows() for split, writer in writers.items()}
        counts: dict[SplitName, dict[str, int]] = {
            split: _class_counts(writer.label_counts) for split, writer in writers.items()
        }
        _check_counts(counts, raw_digest)
        result = ProcessedManifest(
            raw_digest=raw_digest,
            config=config,
            counts=counts,
            mean=statistics.mean(),
            std=statistics.std(),
            shards=shards,
            rows=row_files,
        )
        _publish(processed, result, Path(work), progress)
    return ProcessedVersion(result.digest, result, ProcessedReport(False, _size(result)))


def read_processed(processed: ObjectStore, digest: str) -> ProcessedManifest:
    """The manifest of a version; ObjectNotFoundError where there is none, IntegrityError when it was changed."""
    key = f"{digest}/{MANIFEST_FILE}"
    try:
        data = processed.read_verified(key, digest)
    except ObjectNotFoundError as error:
        raise ObjectNotFoundError(
            f"There is no processed version {digest} in {processed.uri()}: materialize the processed dataset."
        ) from error
    try:
        return ProcessedManifest.model_validate_json(data)
    except ValueError as error:
        raise DataError(f"{processed.uri(key)} is no processed manifest: {error}") from error


def list_processed_versions(processed: ObjectStore) -> list[str]:
    """Digests of the published versions, in order."""
    keys = (info.key for info in processed.list())
    return [key.split("/")[0] for key in keys if key.count("/") == 1 and key.endswith(f"/{MANIFEST_FILE}")]


class ChannelStatistics:
    """Mean and standard deviation per channel, from exact counts of every pixel value."""

    def __init__(self) -> None:
        self._counts = np.zeros((3, 256), dtype=np.int64)

    def add(self, images: NDArray[np.uint8]) -> None:
        """Count the pixels of N x 3 x 32 x 32 images."""
        for channel in range(3):
            self._counts[channel] += np.bincount(images[:, channel].ravel(), minlength=256)

    def mean(self) -> tuple[float, float, float]:
        return self._triple([self._moment(channel, 1) / 255 for channel in range(3)])

    def std(self) -> tuple[float, float, float]:
        return self._triple([self._deviation(channel) / 255 for channel in range(3)])

    def _moment(self, channel: int, power: int) -> float:
        # Python integers: exact, and rounded once, so that every machine gets the same.
        total = sum(int(count) * value**power for value, count in enumerate(self._counts[channel]))
        return total / max(int(self._counts[channel].sum()), 1)

    def _deviation(self, channel: int) -> float:
        count = max(int(self._counts[channel].sum()), 1)
        first = sum(int(number) * value for value, number in enumerate(self._counts[channel]))
        second = sum(int(number) * value * value for value, number in enumerate(self._counts[channel]))
        return ((second * count - first * first) / (count * count)) ** 0.5

    @staticmethod
    def _triple(values: list[float]) -> tuple[float, float, float]:
        red, green, blue = (round(value, 9) for value in values)
        return red, green, blue


def _used_rows(raw: ObjectStore, manifest: RawManifest) -> Iterator[Rows]:
    for number, item in enumerate(manifest.objects):
        used = item.used()
        with fetched(raw, item.key, item.sha256) as path:
            name = raw.uri(item.key)
            for batch in read_rows(path, item.format, item.split, name, resize=manifest.resize):
                keep = used[batch.first_row : batch.first_row + len(batch)]
                if len(keep) != len(batch) or any(used[row] for row in batch.refused):
                    raise IntegrityError(
                        f"{name} gives other rows than raw version {manifest.digest} lists: build it again."
                    )
                yield _rows_of(batch, number).take(keep)


def _rows_of(batch: RowBatch, object_number: int) -> Rows:
    count = len(batch)
    return Rows(
        images=batch.images,
        labels=batch.labels,
        digests=pixel_digests(batch.images),
        objects=np.full(count, object_number, np.int32),
        rows=np.arange(batch.first_row, batch.first_row + count, dtype=np.int64),
        source_splits=np.full(count, batch.split),
    )


def _class_counts(labels: NDArray[np.int64]) -> dict[str, int]:
    return {name: int(count) for name, count in zip(CLASSES, labels, strict=True)}


def _check_counts(counts: dict[SplitName, dict[str, int]], raw_digest: str) -> None:
    for split in NEEDED_SPLITS:
        if not sum(counts[split].values()):
            raise DataError(
                f"Raw version {raw_digest} has no images for the {split} split: add data, or change the fractions."
            )


def _publish(processed: ObjectStore, manifest: ProcessedManifest, work: Path, progress: Progress) -> None:
    digest = manifest.digest
    files = [shard for shards in manifest.shards.values() for shard in shards] + list(manifest.rows.values())
    for number, shard in enumerate(files, 1):
        processed.upload(f"{digest}/{shard.file}", work / shard.file)
        progress("storing shards", number, len(files))
    processed.write(f"{digest}/{MANIFEST_FILE}", canonical_json(manifest.model_dump(mode="json")))
    key = _built_key(manifest.raw_digest, manifest.config)
    processed.write(key, json.dumps({"digest": digest}).encode())


def _find_built(processed: ObjectStore, raw_digest: str, config: SplitConfig) -> ProcessedVersion | None:
    """The version built before from the same input, if all of it is still there."""
    key = _built_key(raw_digest, config)
    if not processed.exists(key):
        return None
    try:
        digest = str(json.loads(processed.read(key))["digest"])
        manifest = read_processed(processed, digest)
    except (ValueError, KeyError, DataError, ObjectNotFoundError) as error:
        logger.warning("Building the processed version again: %s", error)
        return None
    for shard in [item for items in manifest.shards.values() for item in items] + list(manifest.rows.values()):
        key = f"{digest}/{shard.file}"
        if not is_stored(processed, key, shard.sha256, shard.size):
            logger.warning("%s is missing or was changed; building the processed version again.", processed.uri(key))
            return None
    return ProcessedVersion(digest, manifest, ProcessedReport(True, _size(manifest)))


def _built_key(raw_digest: str, config: SplitConfig) -> str:
    if len(raw_digest) != 64:
        raise ConfigError(f"{raw_digest!r} is no raw version's digest.")
    identity = {"raw": raw_digest, "config": config.model_dump(mode="json"), "preparation": PREPARATION}
    return f"built/{sha256_json(identity)}.json"


def _size(manifest: ProcessedManifest) -> int:
    return sum(shard.size for shards in manifest.shards.values() for shard in shards)
