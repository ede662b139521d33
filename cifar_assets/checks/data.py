"""Checks of the two datasets."""

from collections.abc import Iterator

import dagster as dg
import numpy as np
from pydantic import Field

from cifar_assets.assets.keys import PROCESSED_DATASET, RAW_DATASET
from cifar_assets.assets.upstream import current_materialization, data_version, materialized_digest
from cifar_assets.checks.results import WARN, only_selected, result, spec
from cifar_assets.dataset.objects import fetched
from cifar_assets.dataset.processed import SPLIT_NAMES, ProcessedManifest, read_processed
from cifar_assets.dataset.raw import RawManifest, read_raw
from cifar_assets.dataset.reader import open_split
from cifar_assets.errors import IntegrityError, ObjectNotFoundError
from cifar_assets.object_store import ObjectStore
from resources.object_store import ObjectStoreResource

_MEAN_RANGE = (0.05, 0.95)
_STD_RANGE = (0.02, 0.5)
"""Bounds on channel statistics in units of 0 to 1: outside of them images are blank, inverted or scaled twice."""


@dg.multi_asset_check(
    name="raw_dataset_checks",
    can_subset=True,
    specs=[
        spec(
            RAW_DATASET,
            "objects_intact",
            "Every object of the version has the bytes its manifest names. When it fails an object was changed or "
            "lost: restore it, or materialize raw_dataset again.",
            blocking=True,
        ),
        spec(
            RAW_DATASET,
            "nothing_rejected",
            "Everything that landed could be used. When it fails read the reasons in the asset's metadata or beside "
            "the objects under rejected/, correct the data and land it again.",
        ),
    ],
)
@only_selected
def raw_dataset_checks(
    context: dg.AssetCheckExecutionContext, object_store: ObjectStoreResource
) -> Iterator[dg.AssetCheckResult]:
    """Two verdicts on the raw version that this run, or the last one, made."""
    materialization = current_materialization(context, RAW_DATASET)
    manifest = read_raw(object_store.raw, data_version(materialization))
    broken = list(_broken_objects(object_store.raw, manifest))
    yield result(
        RAW_DATASET,
        "objects_intact",
        not broken,
        "; ".join(broken) or f"All {len(manifest.objects)} objects have the digests of the manifest.",
    )
    num_rejected, num_unread = (
        int(str(materialization.metadata[name].value)) if name in materialization.metadata else 0
        for name in ("num_landed_rejected", "num_landed_unread")
    )
    yield result(
        RAW_DATASET,
        "nothing_rejected",
        num_rejected + num_unread == 0,
        f"{num_rejected} landed images or objects were rejected, {num_unread} objects could not be read.",
        severity=WARN,
        num_rejected=num_rejected,
    )


def _broken_objects(raw: ObjectStore, manifest: RawManifest) -> Iterator[str]:
    for item in manifest.objects:
        try:
            with fetched(raw, item.key, item.sha256):
                pass
        except (IntegrityError, ObjectNotFoundError) as error:
            yield str(error)


class ProcessedCheckConfig(dg.Config):
    """Bounds of the checks on the processed dataset."""

    balance_bound: float = Field(
        default=2.0, ge=1, description="Most images of any class over fewest of any class, within one split."
    )


@dg.multi_asset_check(
    name="processed_dataset_checks",
    can_subset=True,
    specs=[
        spec(
            PROCESSED_DATASET,
            "nothing_lost",
            "Every image of the raw version is in exactly one split. When it fails materialize processed_dataset "
            "again.",
            blocking=True,
        ),
        spec(
            PROCESSED_DATASET,
            "splits_disjoint",
            "No image is in two splits, nor twice in one that is trained on. When it fails the test accuracy would say "
            "nothing: find the image by `python -m cifar_assets.dataset where` and remove a copy from the source.",
            blocking=True,
        ),
        spec(
            PROCESSED_DATASET,
            "statistics_in_range",
            "Channel means and deviations are those of photographs. When it fails look at the sample sheet: images are "
            "blank, inverted or scaled twice.",
            blocking=True,
        ),
        spec(
            PROCESSED_DATASET,
            "classes_balanced",
            "No class has many more images than another. When it fails land more of the rare ones.",
        ),
    ],
)
@only_selected
def processed_dataset_checks(
    context: dg.AssetCheckExecutionContext, config: ProcessedCheckConfig, object_store: ObjectStoreResource
) -> Iterator[dg.AssetCheckResult]:
    """Four verdicts on the processed version that this run, or the last one, made."""
    digest = materialized_digest(context, PROCESSED_DATASET)
    manifest = read_processed(object_store.processed, digest)
    num_images = sum(manifest.count(split) for split in SPLIT_NAMES)
    num_raw = read_raw(object_store.raw, manifest.raw_digest).rows
    yield result(
        PROCESSED_DATASET,
        "nothing_lost",
        num_images == num_raw,
        f"{num_images:,} images in the splits, {num_raw:,} in the raw version.",
    )
    yield _disjoint(object_store.processed, digest)
    yield _statistics(manifest)
    yield _balance(manifest, config.balance_bound)


def _disjoint(processed: ObjectStore, digest: str) -> dg.AssetCheckResult:
    # A test split is taken as its source gives it, copies within it included.
    digests = {split: open_split(processed, digest, split).digests for split in SPLIT_NAMES}
    distinct = {split: np.unique(rows, axis=0) for split, rows in digests.items()}
    training = np.concatenate([digests["train"], digests["validation"]])
    together = np.concatenate([training, distinct["test"]])
    num_repeated = len(together) - len(np.unique(together, axis=0))
    return result(
        PROCESSED_DATASET,
        "splits_disjoint",
        num_repeated == 0,
        f"{num_repeated} images repeat one of another split, or of the training data.",
    )


def _statistics(manifest: ProcessedManifest) -> dg.AssetCheckResult:
    good = all(_MEAN_RANGE[0] <= mean <= _MEAN_RANGE[1] for mean in manifest.mean) and all(
        _STD_RANGE[0] <= std <= _STD_RANGE[1] for std in manifest.std
    )
    means, stds = (", ".join(f"{value:.3f}" for value in values) for values in (manifest.mean, manifest.std))
    return result(
        PROCESSED_DATASET,
        "statistics_in_range",
        good,
        f"Means {means} (allowed {_MEAN_RANGE[0]} to {_MEAN_RANGE[1]}), "
        f"deviations {stds} (allowed {_STD_RANGE[0]} to {_STD_RANGE[1]}).",
    )


def _balance(manifest: ProcessedManifest, bound: float) -> dg.AssetCheckResult:
    ratios = {
        split: max(manifest.counts[split].values()) / max(min(manifest.counts[split].values()), 1)
        for split in SPLIT_NAMES
        if manifest.count(split)
    }
    text = ", ".join(f"{split} {ratio:.2f}" for split, ratio in ratios.items())
    return result(
        PROCESSED_DATASET,
        "classes_balanced",
        max(ratios.values()) <= bound,
        f"Largest over smallest class: {text}; allowed {bound:.2f}.",
        severity=WARN,
    )
