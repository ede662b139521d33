"""CIFAR-10's binary records: one label byte, then 3072 bytes of one image (red, green, blue planes, row by row)."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cifar_assets.contracts import IMAGE_SHAPE
from cifar_assets.dataset.formats.rows import BATCH_ROWS, RowBatch, Split, pixel_batches
from resources.errors import DataError

RECORD_BYTES = 1 + int(np.prod(IMAGE_SHAPE))


def parse_records(data: bytes, where: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (N x 3 x 32 x 32) and labels. DataError when the data ends within a record."""
    if len(data) % RECORD_BYTES:
        raise DataError(
            f"{where}: {len(data):,} bytes are not a whole number of records of {RECORD_BYTES} bytes; it is cut off."
        )
    records = np.frombuffer(data, dtype=np.uint8).reshape(-1, RECORD_BYTES)
    return records[:, 1:].reshape(-1, *IMAGE_SHAPE), records[:, 0].astype(np.int64)


def pack_records(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> bytes:
    """The inverse of `parse_records`."""
    return np.concatenate([labels.astype(np.uint8)[:, None], images.reshape(len(images), -1)], axis=1).tobytes()


def read_records(path: Path, split: Split, name: str) -> Iterator[RowBatch]:
    """Rows of a plain file of records."""
    first_row = 0
    with path.open("rb") as file:
        while data := file.read(RECORD_BYTES * BATCH_ROWS):
            images, labels = parse_records(data, name)
            yield from pixel_batches(images, labels, split, first_row)
            first_row += len(labels)
