"""Rows of images, as every format yields them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cifar_assets.contracts import CLASSES, IMAGE_SHAPE
from resources.errors import DataError

Split = Literal["train", "test", "any"]
"""The split of a row in the source; "any" if the source does not define splits."""

SPLITS: tuple[Split, ...] = ("train", "test", "any")
REFUSED_LABEL = -1
_BATCH_ROWS = 2048


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


def row_batches(
    rows: Iterable[tuple[Any, object]], pixels_of: Callable[[Any], NDArray[np.uint8]], split: Split, first_row: int = 0
) -> Iterator[RowBatch]:
    """Batches over rows of a picture and its label. A row that is not usable is marked as refused."""
    rows = iter(rows)
    while True:
        images = np.zeros((_BATCH_ROWS, *IMAGE_SHAPE), np.uint8)
        labels = np.full(_BATCH_ROWS, REFUSED_LABEL)
        refused: dict[int, str] = {}
        count = 0
        for count, (picture, label) in enumerate(islice(rows, _BATCH_ROWS), 1):
            try:
                checked = _check_label(label)
                images[count - 1] = pixels_of(picture)
                labels[count - 1] = checked
            except DataError as error:
                refused[first_row + count - 1] = str(error)
        if not count:
            return
        yield RowBatch(first_row, split, images[:count], labels[:count], refused)
        first_row += count


def pixel_batches(
    images: NDArray[np.uint8], labels: NDArray[np.int64], split: Split, first_row: int = 0
) -> Iterator[RowBatch]:
    """Batches over decoded pixels (N x 3 x 32 x 32) and their labels."""
    return row_batches(zip(images, labels, strict=True), lambda pixels: pixels, split, first_row)


def _check_label(label: object) -> int:
    if isinstance(label, bool) or not isinstance(label, int | np.integer) or not 0 <= label < len(CLASSES):
        raise DataError(f"label {label!r} is out of range: expected an integer from 0 to {len(CLASSES) - 1}")
    return int(label)
