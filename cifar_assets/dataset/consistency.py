"""Which rows may be used together: no image twice, no image with two labels, no test image in training."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from cifar_assets.contracts import CLASSES
from cifar_assets.dataset.formats.rows import SPLITS
from cifar_assets.dataset.index import ObjectIndex
from cifar_assets.dataset.objects import RawObject, ranges_of

_TEST = SPLITS.index("test")

DUPLICATE = "an image of the same pixels is used already"


@dataclass(frozen=True, slots=True)
class Place:
    """Where an image is already used. One is kept per image of the source, so it is small."""

    label: int
    is_test: bool
    key: str
    row: int

    @property
    def where(self) -> str:
        return f"row {self.row} of {self.key}"


class Known(dict[bytes, Place]):
    """Images that a version uses, by binary pixel digest."""


@dataclass(frozen=True)
class Verdict:
    """What became of one landed object's rows."""

    duplicates: tuple[int, ...]
    rejected: dict[int, str]

    def excluded(self) -> tuple[tuple[int, int], ...]:
        return ranges_of([*self.duplicates, *self.rejected])


def check_source(
    items: Sequence[tuple[RawObject, ObjectIndex]], known: Known
) -> tuple[list[RawObject], dict[str, int]]:
    """The source's objects with rows excluded that must not be trained on, and how many for which reason.

    The test split is taken as the source gives it. Fills `known`.
    """
    left_out: Counter[str] = Counter()
    for item, index in items:
        for row, key in enumerate(index.keys()):
            if index.splits[row] == _TEST:
                known.setdefault(key, Place(int(index.labels[row]), True, item.key, row))
    labels_of: dict[bytes, int] = {}
    conflicting = set()
    for _, index in items:
        for key, label, split in zip(index.keys(), index.labels.tolist(), index.splits.tolist(), strict=True):
            if split != _TEST and labels_of.setdefault(key, label) != label:
                conflicting.add(key)
    checked = []
    for item, index in items:
        excluded = []
        for row, (key, split) in enumerate(zip(index.keys(), index.splits.tolist(), strict=True)):
            if split == _TEST:
                continue
            reason = None
            if key in conflicting:
                reason = "the source gives the same pixels two labels"
            elif key in known:
                reason = "test image in the training data" if known[key].is_test else DUPLICATE
            else:
                known[key] = Place(labels_of[key], False, item.key, row)
            if reason:
                left_out[reason] += 1
                excluded.append(row)
        checked.append(item.model_copy(update={"excluded": ranges_of(excluded)}))
    return checked, dict(left_out)


def check_landed(indexes: Sequence[ObjectIndex], known: Known) -> list[Verdict]:
    """A verdict per landed object, in the order given (by content, so that names and times do not matter)."""
    labels_of: dict[bytes, int] = {}
    conflicting = set()
    for index in indexes:
        for row, (key, label) in enumerate(zip(index.keys(), index.labels.tolist(), strict=True)):
            if row not in index.refused and labels_of.setdefault(key, label) != label:
                conflicting.add(key)
    taken: set[bytes] = set()
    verdicts = []
    for index in indexes:
        duplicates: list[int] = []
        rejected = dict(index.refused)
        for row, (key, label) in enumerate(zip(index.keys(), index.labels.tolist(), strict=True)):
            if row in rejected:
                continue
            place = known.get(key)
            reason = _refusal(label, bool(index.splits[row] == _TEST), place)
            if reason is None and place is None and key in conflicting:
                reason = "the same pixels landed with another label too: decide on one and land it alone"
            if reason is not None:
                rejected[row] = reason
            elif place is not None or key in taken:
                duplicates.append(row)
            else:
                taken.add(key)
        verdicts.append(Verdict(tuple(duplicates), dict(sorted(rejected.items()))))
    return verdicts


def _refusal(label: int, is_test: bool, place: Place | None) -> str | None:
    if place is not None and place.label != label:
        return (
            f"labeled {CLASSES[label]}, but the source has the same pixels as {CLASSES[place.label]} ({place.where}): "
            "correct the label or leave the image out"
        )
    if is_test and place is None:
        return "belongs to a test split: the source alone defines the test images; land it as training data"
    if not is_test and place is not None and place.is_test:
        return f"is a test image ({place.where}): training on it would make the test accuracy meaningless"
    return None
