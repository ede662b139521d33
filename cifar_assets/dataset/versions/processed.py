"""Processed dataset versions: prepared pixels in shards, split by image digest, under one digest.

A version consists of parts: the shards of one raw object, or of a few small ones. The content of a part depends only on
its objects and the split settings, so versions share parts and a new version builds only its new ones.
"""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from cifar_assets.contracts import CLASSES, ImageSpec
from cifar_assets.dataset.formats.rows import PREPARATION
from cifar_assets.dataset.index import pixel_digests
from cifar_assets.dataset.objects import GROUP_ROWS, RawObject, fetched, grouped, is_stored, read_rows, read_state
from cifar_assets.dataset.progress import report
from cifar_assets.dataset.versions.raw import RawManifest, read_raw
from cifar_assets.dataset.versions.shards import Shard, ShardWriter, Tensors, channel_totals, mean_and_std
from cifar_assets.dataset.versions.splits import (
    NEEDED_SPLITS,
    SPLIT_NAMES,
    SplitConfig,
    SplitName,
    assign_splits,
    fitting,
)
from cifar_assets.manifest import Manifest
from resources.digests import sha256_json
from resources.errors import DataError, IntegrityError, StoreError
from resources.object_store import ObjectStore

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
PARTS_PREFIX = "parts/"


class ProcessedManifest(Manifest, ImageSpec):
    """What a processed version holds."""

    kind: Literal["cifar10-processed/2", "cifar10-processed/1"] = "cifar10-processed/2"
    raw_digest: str
    preparation: int = PREPARATION
    config: SplitConfig
    classes: tuple[str, ...] = CLASSES
    counts: dict[SplitName, dict[str, int]] = Field(description="Images per split and class.")
    mean: tuple[float, float, float] = Field(description="Per channel, of the train split, in units of 0 to 1.")
    std: tuple[float, float, float] = Field(description="Per channel, of the train split, in units of 0 to 1.")
    shards: dict[SplitName, tuple[Shard, ...]] = Field(description="The images with label and origin, in row order.")
    rows: dict[SplitName, Shard] = Field(
        default={}, description="Only in kind cifar10-processed/1: a separate file with the origins of each split."
    )

    @property
    def files(self) -> list[Shard]:
        """Every stored file except the manifest."""
        return [shard for shards in self.shards.values() for shard in shards] + list(self.rows.values())

    @property
    def size(self) -> int:
        """Total size of its shards in bytes, including shards shared with other versions."""
        return sum(shard.size for shards in self.shards.values() for shard in shards)

    def count(self, split: SplitName) -> int:
        """Number of images in a split."""
        return sum(self.counts[split].values())


@dataclass(frozen=True)
class ProcessedVersion:
    """A published processed version."""

    digest: str
    manifest: ProcessedManifest
    reused: bool
    """Whether it already existed, so that nothing was built."""


class Part(BaseModel):
    """The shards of a few objects, which the shards number by position within the part."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    shards: dict[SplitName, tuple[Shard, ...]]
    labels: dict[SplitName, tuple[int, ...]] = Field(description="Images by label.")
    channels: tuple[tuple[int, int, int], ...] = Field(description="Channel totals of the train split.")

    @property
    def all_shards(self) -> list[Shard]:
        return [shard for shards in self.shards.values() for shard in shards]


def build_processed(
    raw: ObjectStore, processed: ObjectStore, raw_digest: str, config: SplitConfig | None = None
) -> ProcessedVersion:
    """Decode, split and store the images of a raw version; bit-identical for the same raw digest and config.

    Parts of other versions are reused. Memory is bounded by one shard per split, disk by one shard, and the version
    becomes visible atomically, with its manifest. Raises DataError when the train or test split would be empty,
    IntegrityError when an object does not match the raw version.
    """
    config = config or SplitConfig()
    source = read_raw(raw, raw_digest)
    totals = np.zeros((3, 3), np.int64)
    labels = {split: np.zeros(len(source.classes), np.int64) for split in SPLIT_NAMES}
    shards: dict[SplitName, list[Shard]] = {split: [] for split in SPLIT_NAMES}
    num_done, reused = 0, True
    for numbers in _group_objects(source.objects):
        part, is_new = _find_or_build_part(raw, processed, source, numbers, fitting(config, source.objects))
        reused = reused and not is_new
        totals += np.asarray(part.channels, np.int64)
        for split in SPLIT_NAMES:
            labels[split] += np.asarray(part.labels[split])
            shards[split] += [shard.model_copy(update={"objects": numbers}) for shard in part.shards[split]]
        num_done += sum(source.objects[number].used_rows for number in numbers)
        report("preparing images", num_done, source.rows)
    for split in NEEDED_SPLITS:
        if not labels[split].any():
            raise DataError(
                f"Raw version {raw_digest} has no images for the {split} split: add data, or change the fractions."
            )
    mean, std = mean_and_std(totals)
    manifest = ProcessedManifest(
        raw_digest=raw_digest,
        config=config,
        **dict(source.spec),
        counts={split: dict(zip(source.classes, labels[split].tolist(), strict=True)) for split in SPLIT_NAMES},
        mean=mean,
        std=std,
        shards={split: tuple(shards[split]) for split in SPLIT_NAMES},
    )
    key = f"{manifest.digest}/{MANIFEST_FILE}"
    reused = reused and processed.exists(key)
    manifest.write(processed, key)
    missing = next((shard for shard in manifest.files if not processed.exists(shard.file)), None)
    if missing:
        raise StoreError(
            f"{processed.uri(missing.file)} was removed while a version that uses it was built: build it again.",
            transient=True,
        )
    return ProcessedVersion(manifest.digest, manifest, reused)


def read_processed(processed: ObjectStore, digest: str) -> ProcessedManifest:
    """The manifest of a version; ObjectNotFoundError if there is none, IntegrityError if it was changed."""
    missing = f"There is no processed version {digest} in {processed.uri()}: materialize the processed dataset."
    return ProcessedManifest.read(processed, f"{digest}/{MANIFEST_FILE}", digest, missing)


def list_processed_versions(processed: ObjectStore) -> list[str]:
    """Digests of the published versions, sorted."""
    keys = (info.key for info in processed.list())
    return [key.split("/")[0] for key in keys if key.count("/") == 1 and key.endswith(f"/{MANIFEST_FILE}")]


def _group_objects(objects: Sequence[RawObject]) -> list[tuple[int, ...]]:
    """Object numbers of each part: one part per large or source object, in order, then parts of small landed ones."""
    small = [n for n, item in enumerate(objects) if item.role == "landed" and item.used_rows < GROUP_ROWS]
    alone = [(n,) for n in sorted(set(range(len(objects))) - set(small))]
    groups = grouped(small, lambda n: objects[n].sha256, lambda n: objects[n].used_rows)
    return [*alone, *(tuple(group) for group in groups)]


def _find_or_build_part(
    raw: ObjectStore, processed: ObjectStore, manifest: RawManifest, numbers: Sequence[int], config: SplitConfig
) -> tuple[Part, bool]:
    """The part for the objects with these numbers, and whether it was built. A damaged one is rebuilt."""
    items = [manifest.objects[number] for number in numbers]
    identity = {
        "objects": [[item.sha256, item.format, item.split, item.excluded] for item in items],
        "config": config.model_dump(mode="json"),
        "preparation": manifest.key,
    }
    key = f"{PARTS_PREFIX}{sha256_json(identity)}.json"
    part = read_state(processed, key, Part)
    if part and all(is_stored(processed, shard.file, shard.sha256, shard.size) for shard in part.all_shards):
        return part, False
    if part:
        logger.warning("A shard is missing or was changed; rebuilding %s.", processed.uri(key))
    part = _build_part(raw, processed, manifest, items, config)
    processed.write(key, part.model_dump_json().encode())
    return part, True


def _build_part(
    raw: ObjectStore, processed: ObjectStore, manifest: RawManifest, items: Sequence[RawObject], config: SplitConfig
) -> Part:
    totals = np.zeros((3, 3), np.int64)
    with tempfile.TemporaryDirectory(prefix="cifar-part-") as work:
        writers: dict[SplitName, ShardWriter] = {
            split: ShardWriter(processed, Path(work), config.max_shard_rows, manifest) for split in SPLIT_NAMES
        }
        for number, item in enumerate(items):
            for rows, source_split in _used_rows(raw, manifest, item, number):
                positions = assign_splits(rows["digests"], source_split, config)
                for position, split in enumerate(SPLIT_NAMES):
                    taken = {name: tensor[positions == position] for name, tensor in rows.items()}
                    writers[split].add(taken)
                    if split == "train":
                        totals += channel_totals(taken["images"])
        return Part(
            shards={split: writer.finish() for split, writer in writers.items()},
            labels={split: tuple(writer.label_counts.tolist()) for split, writer in writers.items()},
            channels=tuple((count, first, second) for count, first, second in totals.tolist()),
        )


def _used_rows(
    raw: ObjectStore, manifest: RawManifest, item: RawObject, number: int
) -> Iterator[tuple[Tensors, np.ndarray]]:
    """The rows of an object that the version uses, and the split of each row in the source."""
    used = item.used()
    name = raw.uri(item.key)
    with fetched(raw, item.key, item.sha256) as path:
        for batch in read_rows(path, item.format, item.split, name, manifest):
            count, first = len(batch), batch.first_row
            keep = used[first : first + count]
            if len(keep) != count or any(used[row] for row in batch.refused):
                raise IntegrityError(
                    f"{name} does not have the rows that raw version {manifest.digest} lists: build that version again."
                )
            rows: Tensors = {
                "images": batch.images,
                "labels": batch.labels,
                "digests": pixel_digests(batch.images),
                "objects": np.full(count, number, np.int32),
                "rows": np.arange(first, first + count, dtype=np.int64),
            }
            yield {key: tensor[keep] for key, tensor in rows.items()}, np.full(int(keep.sum()), batch.split)
