"""Checks of the two datasets."""

from collections.abc import Iterator

import dagster as dg
from pydantic import Field

from cifar_assets.assets.binding import data_set_checks
from cifar_assets.assets.keys import PROCESSED_DATASET, RAW_DATASET, key_of
from cifar_assets.assets.record import current_materialization, data_version, materialized_digest
from cifar_assets.checks.results import answers, declare
from cifar_assets.data_set import DataSet
from cifar_assets.dataset.versions.processed import ProcessedManifest, read_processed
from cifar_assets.dataset.versions.splits import SPLIT_NAMES
from cifar_assets.dataset.versions.verdicts import judge_processed, judge_raw
from resources.object_store.resource import ObjectStoreResource
from resources.verdict import Verdict

RAW_CHECKS = declare(
    RAW_DATASET,
    blocking={
        "objects_intact": "Every object of the version has the bytes its manifest names. If it fails, an object was "
        "changed or lost: restore it, or materialize raw_dataset again.",
        "splits_filled": "There are images to train on, images to test with and images of every class. If it fails, "
        "the previous version stays current: complete the source and materialize raw_dataset again.",
    },
    warning={
        "nothing_rejected": "All landed data could be used. If it fails, read the reasons in the asset's metadata or "
        "beside the objects under rejected/, correct the data and land it again.",
    },
)


@data_set_checks(RAW_CHECKS)
def raw_dataset_checks(
    data_set: DataSet, context: dg.AssetCheckExecutionContext, object_store: ObjectStoreResource
) -> Iterator[dg.AssetCheckResult]:
    """Results for the raw version that this run made, otherwise the newest one."""
    made = current_materialization(context, key_of(data_set, RAW_DATASET))
    digest = data_version(made)
    judges = {**judge_raw(object_store.raw, digest), "nothing_rejected": lambda: _nothing_rejected(made)}
    yield from answers(context, RAW_CHECKS(data_set), digest, judges)


def _nothing_rejected(made: dg.AssetMaterialization) -> Verdict:
    counts = (made.metadata.get(name) for name in ("num_landed_rejected", "num_landed_unread"))
    num_rejected, num_unread = (int(str(count.value)) if count else 0 for count in counts)
    return Verdict(
        num_rejected + num_unread == 0,
        f"{num_rejected} landed images or objects were rejected, {num_unread} objects could not be read.",
        {"num_rejected": num_rejected},
    )


class ProcessedCheckConfig(dg.Config):
    """Bounds for the checks on the processed dataset."""

    balance_bound: float = Field(
        default=2.0, ge=1, description="Largest allowed ratio of the largest class to the smallest, within one split."
    )


PROCESSED_CHECKS = declare(
    PROCESSED_DATASET,
    blocking={
        "nothing_lost": "Every image of the raw version is in exactly one split, and no split is empty. If it fails, "
        "materialize processed_dataset again, with other fractions if a split is empty.",
        "splits_disjoint": "No image is in two splits, or twice in the training data. If it fails, the test accuracy "
        "is meaningless: find the image with `python -m cifar_assets.dataset where` and remove a copy from the "
        "source.",
        "statistics_in_range": "Channel means and standard deviations are in the range of photographs. If it fails, "
        "look at the sample sheet: images are blank, inverted or scaled twice.",
    },
    warning={
        "classes_balanced": "No class is missing from a split or has many more images than another. If it fails, "
        "land more images of the rare classes.",
    },
)


@data_set_checks(PROCESSED_CHECKS)
def processed_dataset_checks(
    data_set: DataSet,
    context: dg.AssetCheckExecutionContext,
    config: ProcessedCheckConfig,
    object_store: ObjectStoreResource,
) -> Iterator[dg.AssetCheckResult]:
    """Results for the processed version that this run made, otherwise the newest one."""
    digest = materialized_digest(context, key_of(data_set, PROCESSED_DATASET))
    raw, processed = object_store.raw, object_store.processed
    judges = {
        **judge_processed(raw, processed, digest),
        "classes_balanced": lambda: classes_balanced(read_processed(processed, digest), config.balance_bound),
    }
    yield from answers(context, PROCESSED_CHECKS(data_set), digest, judges)


def classes_balanced(manifest: ProcessedManifest, bound: float) -> Verdict:
    """Each non-empty split has images of every class, and not too many of any one class."""
    good, texts = True, []
    for split in SPLIT_NAMES:
        counts = manifest.counts[split]
        if not any(counts.values()):
            texts.append(f"{split} is empty")
        elif missing := [name for name, count in counts.items() if not count]:
            good = False
            texts.append(f"{split} has no {', '.join(missing)}")
        else:
            ratio = max(counts.values()) / min(counts.values())
            good = good and ratio <= bound
            texts.append(f"{split} {ratio:.2f}")
    return Verdict(good, f"Ratio of the largest class to the smallest: {'; '.join(texts)}; allowed {bound:.2f}.")
