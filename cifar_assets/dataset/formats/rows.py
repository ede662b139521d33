"""Rows of images as every format gives them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cifar_assets.contracts import CLASSES

Split = Literal["train", "test", "any"]
"""Where the source puts a row; "any" where the source has no split of its own."""

SPLITS: tuple[Split, ...] = ("train", "test", "any")
BATCH_ROWS = 2048
REFUSED_LABEL = -1


@dataclass(frozen=True)
class RowBatch:
    """Consecutive rows of one object. A refused row has a zero image or label -1."""

    first_row: int
    split: Split
    images: NDArray[np.uint8]
    """N x 3 x 32 x 32, RGB."""
    labels: NDArray[np.int64]
    refused: dict[int, str] = field(default_factory=dict)
    """Why a row is not a usable image, by row number in the object."""

    def __len__(self) -> int:
        return len(self.labels)


def label_refusal(label: object) -> str | None:
    """Why the value is not a class label, or None when it is one."""
    if isinstance(label, bool) or not isinstance(label, int | np.integer):
        return f"label is {label!r}: expected an integer from 0 to {len(CLASSES) - 1}"
    if not 0 <= int(label) < len(CLASSES):
        return f"label {int(label)} is out of range: expected 0 to {len(CLASSES) - 1}"
    return None


def pixel_batches(
    images: NDArray[np.uint8], labels: NDArray[np.int64], split: Split, first_row: int = 0
) -> Iterator[RowBatch]:
    """Batches over decoded pixels (N x 3 x 32 x 32) and their labels; labels that are out of range are refused."""
    is_bad = (labels < 0) | (labels >= len(CLASSES))
    checked = np.where(is_bad, REFUSED_LABEL, labels)
    for start in range(0, len(labels), BATCH_ROWS):
        part = slice(start, start + BATCH_ROWS)
        bad = start + np.flatnonzero(is_bad[part])
        refused = {first_row + int(row): label_refusal(labels[row]) or "" for row in bad}
        yield RowBatch(first_row + start, split, images[part], checked[part], refused)
