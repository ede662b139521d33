"""Blocking checks of raw and processed versions: one function for each check."""

from functools import cache

import numpy as np

from cifar_assets.dataset.objects import fetched
from cifar_assets.dataset.versions.processed import ProcessedManifest, read_processed
from cifar_assets.dataset.versions.raw import RawManifest, read_raw
from cifar_assets.dataset.versions.reader import open_split
from cifar_assets.dataset.versions.splits import SPLIT_NAMES, splits_filled
from resources.errors import IntegrityError, ObjectNotFoundError
from resources.object_store import ObjectStore
from resources.verdict import Judges, Verdict

_MEAN_RANGE = (0.05, 0.95)
_STD_RANGE = (0.02, 0.5)
"""Bounds on channel statistics in units of 0 to 1: outside them, images are blank, inverted or scaled twice."""
_MAX_NAMED = 10


def judge_raw(raw: ObjectStore, digest: str) -> Judges:
    """The blocking checks of a raw version."""
    manifest = cache(lambda: read_raw(raw, digest))
    return {
        "objects_intact": lambda: objects_intact(raw, manifest()),
        "splits_filled": lambda: splits_filled(raw, manifest().objects, manifest()),
    }


def judge_processed(raw: ObjectStore, processed: ObjectStore, digest: str) -> Judges:
    """The blocking checks of a processed version."""
    manifest = cache(lambda: read_processed(processed, digest))
    return {
        "nothing_lost": lambda: nothing_lost(manifest(), read_raw(raw, manifest().raw_digest)),
        "splits_disjoint": lambda: splits_disjoint(processed, digest),
        "statistics_in_range": lambda: statistics_in_range(manifest()),
    }


def objects_intact(raw: ObjectStore, manifest: RawManifest) -> Verdict:
    """Every object has the digest in its manifest. Reads all objects."""
    broken = []
    for item in manifest.objects:
        try:
            with fetched(raw, item.key, item.sha256):
                pass
        except (IntegrityError, ObjectNotFoundError) as error:
            broken.append(str(error))
    if not broken:
        return Verdict(True, f"All {len(manifest.objects)} objects have the digests of the manifest.")
    more = f"; {len(broken) - _MAX_NAMED} more" if len(broken) > _MAX_NAMED else ""
    return Verdict(False, "; ".join(broken[:_MAX_NAMED]) + more, {"num_broken": len(broken)})


def nothing_lost(manifest: ProcessedManifest, raw: RawManifest) -> Verdict:
    """Every image of the raw version is in exactly one split, and no split is empty: training needs all three."""
    counts = {split: manifest.count(split) for split in SPLIT_NAMES}
    text = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    return Verdict(
        all(counts.values()) and sum(counts.values()) == raw.rows,
        f"{text} images in the splits, {raw.rows:,} used ones in the raw version; no split may be empty.",
    )


def splits_disjoint(processed: ObjectStore, digest: str) -> Verdict:
    """No image is in two splits, or twice in the training data. A test split may contain duplicates."""
    digests = {split: open_split(processed, digest, split).digests for split in SPLIT_NAMES}
    training = np.concatenate([digests["train"], digests["validation"]])
    together = np.concatenate([training, np.unique(digests["test"], axis=0)])
    num_repeated = len(together) - len(np.unique(together, axis=0))
    return Verdict(
        num_repeated == 0, f"{num_repeated} images are duplicates of one in another split or in the training data."
    )


def statistics_in_range(manifest: ProcessedManifest) -> Verdict:
    """Channel means and standard deviations are in the range of photographs."""
    good = all(_MEAN_RANGE[0] <= mean <= _MEAN_RANGE[1] for mean in manifest.mean) and all(
        _STD_RANGE[0] <= std <= _STD_RANGE[1] for std in manifest.std
    )
    means, stds = (", ".join(f"{value:.3f}" for value in values) for values in (manifest.mean, manifest.std))
    return Verdict(
        good,
        f"Means {means} (allowed {_MEAN_RANGE[0]} to {_MEAN_RANGE[1]}), "
        f"standard deviations {stds} (allowed {_STD_RANGE[0]} to {_STD_RANGE[1]}).",
    )
