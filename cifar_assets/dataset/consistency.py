"""Which rows may be used together: no image twice, no image with two labels, no test image in training."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cifar_assets.contracts import CLASSES
from cifar_assets.dataset.index import ObjectIndex
from cifar_assets.dataset.objects import RawObject, ranges_of


class Place(NamedTuple):
    """Where an image is already used. There is one for each image of the source, so it is small."""

    label: int
    is_test: bool
    key: str
    row: int


class Known(dict[bytes, Place]):
    """Images that a version uses, by binary pixel digest."""


def check_source(
    items: Sequence[tuple[RawObject, ObjectIndex]], known: Known
) -> tuple[list[RawObject], dict[str, int]]:
    """The source's objects with rows excluded that must not be trained on, and how many for which reason.

    The test split is taken as the source gives it. Fills `known`.
    """
    for item, index in items:
        for row, (pixels, label, is_test) in enumerate(index.images()):
            if is_test:
                known.setdefault(pixels, Place(label, True, item.key, row))
    conflicting = _labeled_twice(
        (pixels, label) for _, index in items for pixels, label, is_test in index.images() if not is_test
    )
    left_out: Counter[str] = Counter()
    checked = []
    for item, index in items:
        excluded = []
        for row, (pixels, label, is_test) in enumerate(index.images()):
            if is_test:
                continue
            if pixels in conflicting:
                reason = "the source gives the same pixels two labels"
            elif pixels in known:
                is_leak = known[pixels].is_test
                reason = "test image in the training data" if is_leak else "an image of the same pixels is used already"
            else:
                known[pixels] = Place(label, False, item.key, row)
                continue
            left_out[reason] += 1
            excluded.append(row)
        checked.append(item.model_copy(update={"excluded": ranges_of(excluded)}))
    return checked, dict(left_out)


def check_landed(indexes: Sequence[ObjectIndex], known: Known) -> list[tuple[list[int], dict[int, str]]]:
    """Per landed object: its rows that repeat an image in use, and its rejected rows with reasons.

    The order given decides which of several copies is used; it is by content, so that names and times do not matter.
    """
    conflicting = _labeled_twice(
        (pixels, label)
        for index in indexes
        for row, (pixels, label, _) in enumerate(index.images())
        if row not in index.refused
    )
    taken: set[bytes] = set()
    checked = []
    for index in indexes:
        duplicates: list[int] = []
        rejected = dict(index.refused)
        for row, (pixels, label, is_test) in enumerate(index.images()):
            if row in rejected:
                continue
            place = known.get(pixels)
            reason = _refusal(label, is_test, place)
            if reason is None and place is None and pixels in conflicting:
                reason = "the same pixels landed with another label too: decide on one and land it alone"
            if reason is not None:
                rejected[row] = reason
            elif place is not None or pixels in taken:
                duplicates.append(row)
            else:
                taken.add(pixels)
        checked.append((duplicates, dict(sorted(rejected.items()))))
    return checked


def _labeled_twice(images: Iterable[tuple[bytes, int]]) -> set[bytes]:
    labels: dict[bytes, int] = {}
    return {pixels for pixels, label in images if labels.setdefault(pixels, label) != label}


def _refusal(label: int, is_test: bool, place: Place | None) -> str | None:
    if place is None:
        if is_test:
            return "belongs to a test split: the source alone defines the test images; land it as training data"
        return None
    where = f"row {place.row} of {place.key}"
    if place.label != label:
        return (
            f"labeled {CLASSES[label]}, but the source has the same pixels as {CLASSES[place.label]} ({where}): "
            "correct the label or leave the image out"
        )
    if place.is_test and not is_test:
        return f"is a test image ({where}): training on it would make the test accuracy meaningless"
    return None
