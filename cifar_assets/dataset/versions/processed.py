"""Processed dataset versions: prepared pixels in shards, split by image digest, under one digest."""

import logging
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from cifar_assets.contracts import CLASSES
from cifar_assets.dataset.index import PREPARATION
from cifar_assets.dataset.progress import report
from cifar_assets.dataset.versions.parts import ChannelStatistics, Part, find_or_build_part, group_objects
from cifar_assets.dataset.versions.raw import read_raw
from cifar_assets.dataset.versions.shards import Shard
from cifar_assets.dataset.versions.splits import NEEDED_SPLITS, SPLIT_NAMES, SplitConfig, SplitName
from resources.digests import canonical_json, sha256_json
from resources.errors import DataError, ObjectNotFoundError, StoreError
from resources.object_store import ObjectStore

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"


class ProcessedManifest(BaseModel):
    """What a processed version holds. The sha256 of its canonical JSON is the version's digest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["cifar10-processed/2", "cifar10-processed/1"] = "cifar10-processed/2"
    raw_digest: str
    preparation: int = PREPARATION
    config: SplitConfig
    classes: tuple[str, ...] = CLASSES
    counts: dict[SplitName, dict[str, int]] = Field(description="Images per split and class.")
    mean: tuple[float, float, float] = Field(description="Per channel, of the train split, in units of 0 to 1.")
    std: tuple[float, float, float] = Field(description="Per channel, of the train split, in units of 0 to 1.")
    shards: dict[SplitName, tuple[Shard, ...]] = Field(description="Images with label and origin, in row order.")
    rows: dict[SplitName, Shard] = Field(
        default={}, description="Of kind cifar10-processed/1: the origins of each split in a file of their own."
    )

    @property
    def digest(self) -> str:
        return sha256_json(self.model_dump(mode="json"))

    @property
    def files(self) -> list[Shard]:
        """Every stored file but the manifest."""
        return [shard for shards in self.shards.values() for shard in shards] + list(self.rows.values())

    @property
    def size(self) -> int:
        """Bytes of its shards, those that it shares with other versions included."""
        return sum(shard.size for shards in self.shards.values() for shard in shards)

    def count(self, split: SplitName) -> int:
        """Images in a split."""
        return sum(self.counts[split].values())


@dataclass(frozen=True)
class ProcessedReport:
    """How a version was obtained."""

    reused: bool
    """Whether it was there already and nothing was built."""
    size: int
    """Bytes of its shards, those that it shares with other versions included."""
    new_size: int = 0
    """Bytes of the shards that were built for it."""


@dataclass(frozen=True)
class ProcessedVersion:
    """A published processed version."""

    digest: str
    manifest: ProcessedManifest
    report: ProcessedReport


def build_processed(
    raw: ObjectStore, processed: ObjectStore, raw_digest: str, config: SplitConfig | None = None
) -> ProcessedVersion:
    """Decode, split and store the images of a raw version; bit-identical for the same raw digest and config.

    Parts that another version has are taken as they are. Memory is bounded by one shard per split, disk by one shard,
    and the version becomes visible all at once, with its manifest. Raises DataError when the train or test split would
    be empty, IntegrityError when an object is not what the raw version says.
    """
    config = config or SplitConfig()
    manifest = read_raw(raw, raw_digest)
    parts: list[tuple[tuple[int, ...], Part]] = []
    done = new_size = 0
    for numbers in group_objects(manifest.objects):
        part, is_new = find_or_build_part(raw, processed, manifest, numbers, config)
        parts.append((numbers, part))
        new_size += part.size if is_new else 0
        done += sum(manifest.objects[number].used_rows for number in numbers)
        report("preparing images", done, manifest.rows)
    result = _assemble(raw_digest, config, parts)
    _check_counts(result.counts, raw_digest)
    key = f"{result.digest}/{MANIFEST_FILE}"
    reused = not new_size and processed.exists(key)
    processed.write(key, canonical_json(result.model_dump(mode="json")))
    missing = next((shard for shard in result.files if not processed.exists(shard.file)), None)
    if missing:
        raise StoreError(
            f"{processed.uri(missing.file)} was removed while a version with it was built: build it again.",
            transient=True,
        )
    return ProcessedVersion(result.digest, result, ProcessedReport(reused, result.size, new_size))


def _assemble(raw_digest: str, config: SplitConfig, parts: list[tuple[tuple[int, ...], Part]]) -> ProcessedManifest:
    statistics = ChannelStatistics()
    labels = {split: np.zeros(len(CLASSES), np.int64) for split in SPLIT_NAMES}
    shards: dict[SplitName, list[Shard]] = {split: [] for split in SPLIT_NAMES}
    for numbers, part in parts:
        statistics.merge(part.channels)
        for split in SPLIT_NAMES:
            labels[split] += np.asarray(part.labels[split])
            shards[split] += [shard.model_copy(update={"objects": numbers}) for shard in part.shards[split]]
    return ProcessedManifest(
        raw_digest=raw_digest,
        config=config,
        counts={split: dict(zip(CLASSES, labels[split].tolist(), strict=True)) for split in SPLIT_NAMES},
        mean=statistics.mean(),
        std=statistics.std(),
        shards={split: tuple(shards[split]) for split in SPLIT_NAMES},
    )


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


def _check_counts(counts: dict[SplitName, dict[str, int]], raw_digest: str) -> None:
    for split in NEEDED_SPLITS:
        if not sum(counts[split].values()):
            raise DataError(
                f"Raw version {raw_digest} has no images for the {split} split: add data, or change the fractions."
            )
