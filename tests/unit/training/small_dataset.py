"""A processed dataset of a few drawn images, in the format of `cifar_assets.dataset`."""

import tempfile
from pathlib import Path

import numpy as np

from cifar_assets.contracts import CIFAR10, IMAGE_SIZE, ImageSpec
from cifar_assets.dataset.index import pixel_digests
from cifar_assets.dataset.sources.synthetic import draw_split
from cifar_assets.dataset.versions.processed import MANIFEST_FILE, ProcessedManifest
from cifar_assets.dataset.versions.shards import Shard, ShardWriter, Tensors, channel_totals, mean_and_std
from cifar_assets.dataset.versions.splits import SPLIT_NAMES, SplitConfig, SplitName
from resources.digests import canonical_json
from resources.object_store import FolderStore

RAW_DIGEST = "0" * 64


def store_dataset(
    bucket: Path,
    train: int = 96,
    validation: int = 40,
    test: int = 40,
    shard_rows: int = 64,
    images: ImageSpec = CIFAR10,
) -> str:
    """Write a processed dataset below the bucket's folder and return its digest."""
    store = FolderStore(bucket)
    with tempfile.TemporaryDirectory() as name:
        writers: dict[SplitName, ShardWriter] = {
            split: ShardWriter(store, Path(name), shard_rows, images) for split in SPLIT_NAMES
        }
        totals = []
        for number, (split, count) in enumerate(zip(SPLIT_NAMES, (train, validation, test), strict=True)):
            rows = _drawn_rows(number, count, images)
            writers[split].add(rows)
            totals.append(channel_totals(rows["images"]))
        mean, std = mean_and_std(totals[0])
        manifest = ProcessedManifest(
            raw_digest=RAW_DIGEST,
            config=SplitConfig(max_shard_rows=shard_rows),
            classes=images.classes,
            image_size=images.image_size,
            counts={split: _counts(writer, images.classes) for split, writer in writers.items()},
            mean=mean,
            std=std,
            shards={split: _with_object(writer.finish()) for split, writer in writers.items()},
        )
        store.write(f"{manifest.digest}/{MANIFEST_FILE}", canonical_json(manifest.model_dump(mode="json")))
    return manifest.digest


def _with_object(shards: tuple[Shard, ...]) -> tuple[Shard, ...]:
    return tuple(shard.model_copy(update={"objects": (0,)}) for shard in shards)


def _drawn_rows(seed: int, count: int, spec: ImageSpec) -> Tensors:
    images, labels = draw_split(seed, "train", count)
    step = IMAGE_SIZE // spec.image_size
    images, labels = np.ascontiguousarray(images[:, :, ::step, ::step]), labels % len(spec.classes)
    return {
        "images": images,
        "labels": labels,
        "digests": pixel_digests(images),
        "objects": np.zeros(count, np.int32),
        "rows": np.arange(count, dtype=np.int64),
    }


def _counts(writer: ShardWriter, classes: tuple[str, ...]) -> dict[str, int]:
    return {name: int(count) for name, count in zip(classes, writer.label_counts, strict=False)}
