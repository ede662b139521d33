"""Rows of images as every format hands them out."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cifar_assets.contracts import CLASSES, IMAGE_SHAPE

Split = Literal["train", "test", "any"]
"""Where the source puts a row; "any" where the source has no split of its own."""

SPLITS: tuple[Split, ...] = ("train", "test", "any")
BATCH_ROWS = 2048
BATCH_BYTES = 64 << 20
"""Encoded images held at a time; of CIFAR-10's own, a batch has 5 MB."""

REFUSED_LABEL = -1


@dataclass(frozen=True)
class RowBatch:
    """Consecutive rows of one object. A refused row has a zero image and label -1."""

    first_row: int
    split: Split
    images: NDArray[np.uint8]
    """N x 3 x 32 x 32, RGB."""
    labels: NDArray[np.int64]
    refused: dict[int, str] = field(default_factory=dict)
    """Why a row is not a usable image, by row number in the object."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class EncodedRow:
    """One row before decoding: image file bytes and label, or the reason why it cannot be used."""

    data: bytes | None
    label: int
    refusal: str | None = None


def label_refusal(label: object) -> str | None:
    """Why the value is not a class label, or None when it is one."""
    if isinstance(label, bool) or not isinstance(label, int | np.integer):
        return f"label is {label!r}: expected an integer from 0 to {len(CLASSES) - 1}"
    if not 0 <= int(label) < len(CLASSES):
        return f"label {int(label)} is out of range: expected 0 to {len(CLASSES) - 1}"
    return None


def checked_labels(labels: NDArray[np.int64], first_row: int) -> tuple[NDArray[np.int64], dict[int, str]]:
    """The labels with those out of range replaced, and a refusal for each of these."""
    bad = np.flatnonzero((labels < 0) | (labels >= len(CLASSES)))
    refused = {first_row + int(i): label_refusal(labels[i]) or "" for i in bad}
    checked = labels.copy()
    checked[bad] = REFUSED_LABEL
    return checked, refused


def pixel_batches(
    images: NDArray[np.uint8], labels: NDArray[np.int64], split: Split, first_row: int
) -> Iterator[RowBatch]:
    """Batches over decoded pixels (N x 3 x 32 x 32) and their labels."""
    for start in range(0, len(labels), BATCH_ROWS):
        part = slice(start, start + BATCH_ROWS)
        checked, refused = checked_labels(labels[part], first_row + start)
        yield RowBatch(first_row + start, split, images[part], checked, refused)


def empty_images(count: int) -> NDArray[np.uint8]:
    """Zero images, N x 3 x 32 x 32."""
    return np.zeros((count, *IMAGE_SHAPE), dtype=np.uint8)


def in_batches(rows: Iterable[EncodedRow]) -> Iterator[list[EncodedRow]]:
    """The rows in lists of at most BATCH_ROWS, and of about BATCH_BYTES."""
    batch: list[EncodedRow] = []
    num_bytes = 0
    for row in rows:
        batch.append(row)
        num_bytes += len(row.data or b"")
        if len(batch) == BATCH_ROWS or num_bytes >= BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch
