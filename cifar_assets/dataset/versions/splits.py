"""Assigns images to splits."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from cifar_assets.dataset.formats.rows import SPLITS, Preparation
from cifar_assets.dataset.index import index_of
from cifar_assets.dataset.objects import RawObject
from resources.object_store import ObjectStore
from resources.verdict import Verdict

SplitName = Literal["train", "validation", "test"]
SPLIT_NAMES: tuple[SplitName, ...] = ("train", "validation", "test")
NEEDED_SPLITS: tuple[SplitName, ...] = ("train", "test")
"""A dataset without images in these splits cannot be used for training or evaluation."""


class SplitConfig(BaseModel):
    """How images are divided. An image's split depends only on its digest, so adding images does not move others."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    validation_fraction: float = Field(default=0.1, ge=0, lt=1, description="Fraction of training images held out.")
    test_fraction: float = Field(
        default=0.1, gt=0, lt=1, description="Fraction of images held out for testing if the source has no test split."
    )
    max_shard_rows: int = Field(default=16_384, ge=1, description="Images of 3 kB per shard; fewer larger ones.")


def assign_splits(
    digests: NDArray[np.uint8], source_splits: NDArray[np.str_], config: SplitConfig
) -> NDArray[np.int64]:
    """Position in SPLIT_NAMES of each image, given its pixel digest (N x 32) and its split in the source.

    Bytes 0 to 7 of the digest, as a number from 0 to 1, decide on validation, bytes 8 to 15 on test, where the source
    does not.
    """
    numbers = digests[:, :16].copy().view(">u8") / 2.0**64
    in_test = (source_splits == "test") | ((source_splits == "any") & (numbers[:, 1] < config.test_fraction))
    in_validation = (source_splits == "validation") | (numbers[:, 0] < config.validation_fraction)
    return np.where(in_test, 2, np.where(in_validation, 1, 0))


def fitting(config: SplitConfig, objects: Sequence[RawObject]) -> SplitConfig:
    """The config for these objects: nothing is held out for validation if the source has a validation split."""
    has_validation = any(item.split == "validation" for item in objects)
    return config.model_copy(update={"validation_fraction": 0.0}) if has_validation else config


def splits_filled(raw: ObjectStore, objects: Sequence[RawObject], how: Preparation) -> Verdict:
    """Whether the used rows of the objects include training images, test images, and images of every class."""
    num_classes, config = len(how.classes), fitting(SplitConfig(), objects)
    per_split, per_class = np.zeros(len(SPLIT_NAMES), np.int64), np.zeros(num_classes, np.int64)
    for item in objects:
        index = index_of(raw, item, how, keep=False)  # the pipelines have read-only access here
        used = item.used()
        positions = assign_splits(index.digests[used], np.asarray(SPLITS)[index.splits[used]], config)
        per_split += np.bincount(positions, minlength=len(SPLIT_NAMES))
        per_class += np.bincount(index.labels[used], minlength=num_classes)
    counts = dict(zip(SPLIT_NAMES, per_split.tolist(), strict=True))
    empty = [name for name in NEEDED_SPLITS if not counts[name]]
    lost = [how.classes[label] for label in np.flatnonzero(per_class == 0)]
    text = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    if empty:
        text += f": no images for the {' and '.join(empty)} split. Add data to the source, or change the fractions"
    if lost:
        text += f"; no images of {', '.join(lost)}: the asset's metadata lists what was not read of the source"
    return Verdict(not empty and not lost, f"{text}.", {f"num_{name}": count for name, count in counts.items()})
