"""Parts of a processed version: the shards of one raw object, or of a few small ones, shared by all versions.

What a part holds depends on its objects and the split alone. So a new version builds parts for what is new in it, and
takes the others as they are.
"""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from cifar_assets.dataset.formats.rows import RowBatch
from cifar_assets.dataset.index import PREPARATION, pixel_digests
from cifar_assets.dataset.objects import RawObject, fetched, is_stored, read_rows, read_state
from cifar_assets.dataset.versions.grouping import GROUP_ROWS, grouped
from cifar_assets.dataset.versions.raw import RawManifest
from cifar_assets.dataset.versions.shards import Rows, Shard, ShardWriter
from cifar_assets.dataset.versions.splits import SPLIT_NAMES, SplitConfig, SplitName, assign_splits
from resources.digests import sha256_json
from resources.errors import IntegrityError
from resources.object_store import ObjectStore

logger = logging.getLogger(__name__)

PARTS_PREFIX = "parts/"


class Part(BaseModel):
    """The shards of a few objects, whose numbers in the shards are those within the part."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    shards: dict[SplitName, tuple[Shard, ...]]
    labels: dict[SplitName, tuple[int, ...]] = Field(description="Images by label.")
    channels: tuple[tuple[int, int, int], ...] = Field(description="ChannelStatistics of the train split.")

    @property
    def all_shards(self) -> list[Shard]:
        return [shard for shards in self.shards.values() for shard in shards]

    @property
    def size(self) -> int:
        """Bytes of its shards."""
        return sum(shard.size for shard in self.all_shards)


class ChannelStatistics:
    """Mean and standard deviation per channel, from exact sums over every pixel."""

    def __init__(self, totals: Sequence[Sequence[int]] = ((0, 0, 0),) * 3) -> None:
        self._totals = [list(each) for each in totals]

    def add(self, images: NDArray[np.uint8]) -> None:
        """Count the pixels of N x 3 x 32 x 32 images."""
        values = np.arange(256, dtype=np.int64)
        for channel in range(3):
            counts = np.bincount(images[:, channel].ravel(), minlength=256)
            self.merge_channel(channel, (int(counts.sum()), int(counts @ values), int(counts @ values**2)))

    def merge(self, totals: Sequence[Sequence[int]]) -> None:
        """Add what other images came to."""
        for channel, each in enumerate(totals):
            self.merge_channel(channel, each)

    def merge_channel(self, channel: int, totals: Sequence[int]) -> None:
        self._totals[channel] = [mine + other for mine, other in zip(self._totals[channel], totals, strict=True)]

    @property
    def totals(self) -> tuple[tuple[int, int, int], ...]:
        """Per channel: number of pixels, their sum, and the sum of their squares."""
        return tuple((count, first, second) for count, first, second in self._totals)

    # Python integers: exact, and rounded once, so that every machine gets the same.
    def mean(self) -> tuple[float, float, float]:
        red, green, blue = (round(first / max(count, 1) / 255, 9) for count, first, _ in self._totals)
        return red, green, blue

    def std(self) -> tuple[float, float, float]:
        red, green, blue = (
            round(((second * count - first * first) / (max(count, 1) ** 2)) ** 0.5 / 255, 9)
            for count, first, second in self._totals
        )
        return red, green, blue


def group_objects(objects: Sequence[RawObject]) -> list[tuple[int, ...]]:
    """Numbers of the objects of each part: large and source objects alone, in order; then small landed ones."""
    small = [n for n, item in enumerate(objects) if item.role == "landed" and item.used_rows < GROUP_ROWS]
    alone = [(n,) for n in sorted(set(range(len(objects))) - set(small))]
    groups = grouped(small, lambda n: objects[n].sha256, lambda n: objects[n].used_rows)
    return [*alone, *(tuple(group) for group in groups)]


def find_or_build_part(
    raw: ObjectStore, processed: ObjectStore, manifest: RawManifest, numbers: Sequence[int], config: SplitConfig
) -> tuple[Part, bool]:
    """The part of the objects with these numbers, and whether it had to be built. A damaged one is built again.

    Memory is bounded by one shard per split. IntegrityError when an object is not what the raw version says.
    """
    items = [manifest.objects[number] for number in numbers]
    identity = {
        "objects": [[item.sha256, item.format, item.split, item.excluded] for item in items],
        "config": config.model_dump(mode="json"),
        "preparation": [PREPARATION, manifest.resize],
    }
    key = f"{PARTS_PREFIX}{sha256_json(identity)}.json"
    part = read_state(processed, key, Part)
    if part and all(is_stored(processed, shard.file, shard.sha256, shard.size) for shard in part.all_shards):
        return part, False
    if part:
        logger.warning("A shard is missing or was changed; building %s again.", processed.uri(key))
    part = _build(raw, processed, manifest, items, config)
    processed.write(key, part.model_dump_json().encode())
    return part, True


def _build(
    raw: ObjectStore, processed: ObjectStore, manifest: RawManifest, items: Sequence[RawObject], config: SplitConfig
) -> Part:
    statistics = ChannelStatistics()
    with tempfile.TemporaryDirectory(prefix="cifar-part-") as work:
        writers: dict[SplitName, ShardWriter] = {
            split: ShardWriter(processed, Path(work), config.max_shard_rows) for split in SPLIT_NAMES
        }
        for number, item in enumerate(items):
            for rows in _used_rows(raw, manifest, item, number):
                positions = assign_splits(rows.digests, rows.source_splits, config)
                for position, split in enumerate(SPLIT_NAMES):
                    taken = rows.take(positions == position)
                    writers[split].add(taken)
                    if split == "train":
                        statistics.add(taken.images)
        shards: dict[SplitName, tuple[Shard, ...]] = {split: writer.finish() for split, writer in writers.items()}
    labels: dict[SplitName, tuple[int, ...]] = {
        split: tuple(writer.label_counts.tolist()) for split, writer in writers.items()
    }
    return Part(shards=shards, labels=labels, channels=statistics.totals)


def _used_rows(raw: ObjectStore, manifest: RawManifest, item: RawObject, number: int) -> Iterator[Rows]:
    used = item.used()
    name = raw.uri(item.key)
    with fetched(raw, item.key, item.sha256) as path:
        for batch in read_rows(path, item.format, item.split, name, resize=manifest.resize):
            keep = used[batch.first_row : batch.first_row + len(batch)]
            if len(keep) != len(batch) or any(used[row] for row in batch.refused):
                raise IntegrityError(
                    f"{name} gives other rows than raw version {manifest.digest} lists: build it again."
                )
            yield _rows_of(batch, number).take(keep)


def _rows_of(batch: RowBatch, number: int) -> Rows:
    count = len(batch)
    return Rows(
        images=batch.images,
        labels=batch.labels,
        digests=pixel_digests(batch.images),
        objects=np.full(count, number, np.int32),
        rows=np.arange(batch.first_row, batch.first_row + count, dtype=np.int64),
        source_splits=np.full(count, batch.split),
    )
