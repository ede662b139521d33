"""Which rows may be used together: no image twice, no image with two labels, no test image in training."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cifar_assets.dataset.formats.rows import SPLITS
from cifar_assets.dataset.index import ObjectIndex
from cifar_assets.dataset.objects import RawObject, ranges_of

_TWO_LABELS = "the source has the same pixels with two labels"
_TEST_IMAGE = "test image in the training data"
_USED = "an image with the same pixels is already used"


class Place(NamedTuple):
    """Where an image is already used."""

    label: int
    is_test: bool
    key: str
    row: int


@dataclass(frozen=True)
class Known:
    """The images that a version uses. Sorted arrays, because a dict of them would take five times as much memory."""

    digests: NDArray[np.void] = field(default_factory=lambda: np.empty(0, "V32"))
    rows: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """Positions in the rows of all objects together."""
    items: Sequence[tuple[RawObject, ObjectIndex]] = ()

    def get(self, pixels: bytes) -> Place | None:
        """Where the image with this binary pixel digest is used."""
        position = int(np.searchsorted(self.digests, np.void(pixels)))
        if position == len(self.digests) or self.digests[position].tobytes() != pixels:
            return None
        row = int(self.rows[position])
        for item, index in self.items:
            if row < len(index):
                return Place(int(index.labels[row]), SPLITS[index.splits[row]] == "test", item.key, row)
            row -= len(index)
        return None


def check_source(items: Sequence[tuple[RawObject, ObjectIndex]]) -> tuple[list[RawObject], dict[str, int], Known]:
    """The source's objects without the rows that must not be trained on, and the number of excluded rows by reason.

    The test split is used as the source provides it. The third value finds each image that is used.
    """
    if not items:
        return [], {}, Known()
    digests, labels, splits = (
        np.concatenate([getattr(index, name) for _, index in items]) for name in ("digests", "labels", "splits")
    )
    unique, group = np.unique(np.ascontiguousarray(digests).view("V32").ravel(), return_inverse=True)
    test = np.flatnonzero(splits == SPLITS.index("test"))
    train = np.flatnonzero(splits != SPLITS.index("test"))
    first = np.full(len(unique), len(group))  # the row that is used; a test image's, if there is one
    np.minimum.at(first, group[test], test)
    in_test = (first < len(group))[group[train]]
    lowest, highest = np.full(len(unique), np.iinfo(np.int64).max), np.full(len(unique), -1)
    np.minimum.at(lowest, group[train], labels[train])
    np.maximum.at(highest, group[train], labels[train])
    conflicting = (lowest != highest)[group[train]]
    free = train[~in_test & ~conflicting]
    np.minimum.at(first, group[free], free)
    excluded = np.zeros(len(group), bool)
    excluded[train] = in_test | conflicting | (first[group[train]] != train)
    left_out = {
        _TWO_LABELS: int(conflicting.sum()),
        _TEST_IMAGE: int((in_test & ~conflicting).sum()),
        _USED: int((excluded[train] & ~in_test & ~conflicting).sum()),
    }
    checked, start = [], 0
    for item, index in items:
        rows = np.flatnonzero(excluded[start : start + len(index)]).tolist()
        checked.append(item.model_copy(update={"excluded": ranges_of(rows)}))
        start += len(index)
    used = np.flatnonzero(first < len(group))
    known = Known(unique[used], first[used], items)
    return checked, {reason: count for reason, count in left_out.items() if count}, known


def check_landed(
    indexes: Sequence[ObjectIndex], known: Known, classes: tuple[str, ...]
) -> list[tuple[list[int], dict[int, str]]]:
    """Per landed object: the rows that duplicate an image in use, and the rejected rows with reasons.

    The given order determines which of several copies is used. It depends on content, not on names or times.
    """
    labels: dict[bytes, int] = {}
    images = (image for index in indexes for image in index.images())
    conflicting = {pixels for pixels, label, _ in images if labels.setdefault(pixels, label) != label}
    taken: set[bytes] = set()
    checked = []
    for index in indexes:
        duplicates: list[int] = []
        rejected: dict[int, str] = {}
        for row, (pixels, label, is_test) in enumerate(index.images()):
            place = known.get(pixels)
            reason = index.refused.get(row) or _refusal(label, is_test, place, pixels in conflicting, classes)
            if reason:
                rejected[row] = reason
            elif place or pixels in taken:
                duplicates.append(row)
            else:
                taken.add(pixels)
        checked.append((duplicates, rejected))
    return checked


def _refusal(
    label: int, is_test: bool, place: Place | None, is_conflicting: bool, classes: tuple[str, ...]
) -> str | None:
    if place is None and is_test:
        return "belongs to a test split, but only the source defines test images; land it as training data"
    if place is None:
        text = "the same pixels also landed with another label: land them with the correct label only"
        return text if is_conflicting else None
    where = f"row {place.row} of {place.key}"
    if place.label != label:
        return (
            f"labeled {classes[label]}, but the source has the same pixels as {classes[place.label]} ({where}): "
            "correct the label or leave the image out"
        )
    if place.is_test and not is_test:
        return f"is a test image ({where}): training on it would make the test accuracy meaningless"
    return None
