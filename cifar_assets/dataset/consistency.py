"""Which rows may be used together: no image twice, no image with two labels, no test image in training."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cifar_assets.contracts import CLASSES
from cifar_assets.dataset.index import ObjectIndex
from cifar_assets.dataset.objects import RawObject, ranges_of


class Place(NamedTuple):
    """Where an image is already used. Kept small: there is one for each image of the source."""

    label: int
    is_test: bool
    key: str
    row: int


Known = dict[bytes, Place]
"""Images that a version uses, keyed by binary pixel digest."""


def check_source(
    items: Sequence[tuple[RawObject, ObjectIndex]], known: Known
) -> tuple[list[RawObject], dict[str, int]]:
    """The source's objects without the rows that must not be trained on, and the number of excluded rows by reason.

    The test split is used as the source provides it. Fills `known`.
    """
    for item, index in items:
        for row, (pixels, label, is_test) in enumerate(index.images()):
            if is_test:
                known.setdefault(pixels, Place(label, True, item.key, row))
    conflicting = _labeled_twice(image for _, index in items for image in index.images() if not image[2])
    left_out: Counter[str] = Counter()
    checked = []
    for item, index in items:
        excluded = []
        for row, (pixels, label, is_test) in enumerate(index.images()):
            if is_test:
                continue
            place = known.get(pixels)
            if place is None and pixels not in conflicting:
                known[pixels] = Place(label, False, item.key, row)
                continue
            excluded.append(row)
            if pixels in conflicting:
                left_out["the source has the same pixels with two labels"] += 1
            elif place and place.is_test:
                left_out["test image in the training data"] += 1
            else:
                left_out["an image with the same pixels is already used"] += 1
        checked.append(item.model_copy(update={"excluded": ranges_of(excluded)}))
    return checked, dict(left_out)


def check_landed(indexes: Sequence[ObjectIndex], known: Known) -> list[tuple[list[int], dict[int, str]]]:
    """Per landed object: the rows that duplicate an image in use, and the rejected rows with reasons.

    The given order determines which of several copies is used. It depends on content, not on names or times.
    """
    conflicting = _labeled_twice(image for index in indexes for image in index.images())
    taken: set[bytes] = set()
    checked = []
    for index in indexes:
        duplicates: list[int] = []
        rejected: dict[int, str] = {}
        for row, (pixels, label, is_test) in enumerate(index.images()):
            place = known.get(pixels)
            reason = index.refused.get(row) or _refusal(label, is_test, place, pixels in conflicting)
            if reason:
                rejected[row] = reason
            elif place or pixels in taken:
                duplicates.append(row)
            else:
                taken.add(pixels)
        checked.append((duplicates, rejected))
    return checked


def _labeled_twice(images: Iterable[tuple[bytes, int, bool]]) -> set[bytes]:
    labels: dict[bytes, int] = {}
    return {pixels for pixels, label, _ in images if labels.setdefault(pixels, label) != label}


def _refusal(label: int, is_test: bool, place: Place | None, is_conflicting: bool) -> str | None:
    if place is None and is_test:
        return "belongs to a test split, but only the source defines test images; land it as training data"
    if place is None:
        text = "the same pixels also landed with another label: land them with the correct label only"
        return text if is_conflicting else None
    where = f"row {place.row} of {place.key}"
    if place.label != label:
        return (
            f"labeled {CLASSES[label]}, but the source has the same pixels as {CLASSES[place.label]} ({where}): "
            "correct the label or leave the image out"
        )
    if place.is_test and not is_test:
        return f"is a test image ({where}): training on it would make the test accuracy meaningless"
    return None
