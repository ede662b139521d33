"""Encoded rows to pixels, on several threads."""

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from cifar_assets.cpus import available_cpus
from cifar_assets.dataset.formats.images import ImageError, prepare_image
from cifar_assets.dataset.formats.rows import REFUSED_LABEL, EncodedRow, RowBatch, Split, empty_images, in_batches

_CHUNK = 64


def decode_rows(rows: Iterable[EncodedRow], split: Split, *, resize: bool) -> Iterator[RowBatch]:
    """Batches of decoded rows in the order given. A row that does not decode is refused, not raised."""
    workers = min(4, math.ceil(available_cpus()))
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        first_row = 0
        for batch in in_batches(rows):
            yield _decode_batch(batch, split, resize, first_row, pool)
            first_row += len(batch)


def _decode_batch(
    batch: list[EncodedRow], split: Split, resize: bool, first_row: int, pool: ThreadPoolExecutor
) -> RowBatch:
    images = empty_images(len(batch))
    labels = np.array([row.label for row in batch], dtype=np.int64)
    refused: dict[int, str] = {}
    starts = range(0, len(batch), _CHUNK)
    for found in pool.map(lambda start: _decode_chunk(batch, start, images, resize), starts):
        refused.update(found)
    for position in refused:
        labels[position] = REFUSED_LABEL
    by_row = {first_row + position: reason for position, reason in sorted(refused.items())}
    return RowBatch(first_row, split, images, labels, by_row)


def _decode_chunk(batch: list[EncodedRow], start: int, images: NDArray[np.uint8], resize: bool) -> dict[int, str]:
    refused: dict[int, str] = {}
    for position in range(start, min(start + _CHUNK, len(batch))):
        row = batch[position]
        if row.refusal is not None or row.data is None:
            refused[position] = row.refusal or "the image is missing"
            continue
        try:
            images[position] = prepare_image(row.data, resize=resize)
        except ImageError as error:
            refused[position] = str(error)
    return refused
