"""Rows of images, as every format yields them."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from cifar_assets.contracts import ImageSpec
from resources.digests import sha256_json
from resources.errors import DataError

Split = Literal["train", "test", "any", "validation"]
"""The split of a row in the source; "any" if the source does not define a test split."""

SPLITS: tuple[Split, ...] = ("train", "test", "any", "validation")
REFUSED_LABEL = -1
_BATCH_BYTES = 6 << 20

PREPARATION = 3
"""Incremented whenever `prepare_image` gives other pixels for an image that it accepted before, or refuses it."""


class Preparation(ImageSpec):
    """How the rows of an object become images and labels."""

    resize: bool = Field(description="Whether images of another size were scaled; otherwise they were refused.")

    @property
    def key(self) -> str:
        """Short digest: what was derived with another one must not be used."""
        return f"{PREPARATION}-{sha256_json(self.settings)[:16]}"

    @property
    def settings(self) -> dict[str, Any]:
        """The fields as JSON, without those of a subclass."""
        return self.model_dump(mode="json", include=set(Preparation.model_fields))


@dataclass(frozen=True)
class RowBatch:
    """Consecutive rows of one object. A refused row has a zero image or label -1."""

    first_row: int
    split: Split
    images: NDArray[np.uint8]
    """N x 3 x size x size, RGB."""
    labels: NDArray[np.int64]
    refused: dict[int, str] = field(default_factory=dict)
    """Why a row is not a usable image, by row number in the object."""

    def __len__(self) -> int:
        return len(self.labels)


def row_batches(
    rows: Iterable[tuple[Any, object]],
    pixels_of: Callable[[Any], NDArray[np.uint8]],
    split: Split,
    images: ImageSpec,
    first_row: int = 0,
) -> Iterator[RowBatch]:
    """Batches over rows of a picture and its label. A row that is not usable is marked as refused."""
    rows = iter(rows)
    most = max(1, _BATCH_BYTES // math.prod(images.image_shape))
    while True:
        pixels = np.zeros((most, *images.image_shape), np.uint8)
        labels = np.full(most, REFUSED_LABEL)
        refused: dict[int, str] = {}
        count = 0
        for count, (picture, label) in enumerate(islice(rows, most), 1):
            try:
                checked = _check_label(label, len(images.classes))
                pixels[count - 1] = pixels_of(picture)
                labels[count - 1] = checked
            except DataError as error:
                refused[first_row + count - 1] = str(error)
        if not count:
            return
        yield RowBatch(first_row, split, pixels[:count], labels[:count], refused)
        first_row += count


def _check_label(label: object, num_classes: int) -> int:
    if isinstance(label, bool) or not isinstance(label, int | np.integer) or not 0 <= label < num_classes:
        raise DataError(f"label {label!r} is out of range: expected an integer from 0 to {num_classes - 1}")
    return int(label)
