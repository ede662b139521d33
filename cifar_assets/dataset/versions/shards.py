"""Shards: safetensors files with images of a split and the origin of each image."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cifar_assets.contracts import ImageSpec
from cifar_assets.dataset.objects import store_object
from resources.digests import sha256_file
from resources.errors import DataError
from resources.object_store import ObjectStore

SHARDS_PREFIX = "shards/"
_DTYPES = {"U8": np.dtype("u1"), "I32": np.dtype("<i4"), "I64": np.dtype("<i8")}
_ROW_BYTES = 3072
_TENSORS = ("images", "labels", "digests", "objects", "rows")

Channels = tuple[float, float, float]
Tensors = dict[str, NDArray]
"""Prepared images and their origins, in arrays of equal length.

`images` (N x 3 x size x size), `labels`, `digests` (N x 32: sha256 of the pixels), `objects` (number of the object in
its part) and `rows` (row in that object).
"""


class Shard(BaseModel):
    """One stored file of a processed version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str = Field(description="Key in the processed bucket; in kind cifar10-processed/1, relative to the version.")
    sha256: str
    size: int = Field(description="Bytes.")
    rows: int
    objects: tuple[int, ...] = Field(
        default=(), description="Positions in the raw version of the objects that the rows refer to as 0, 1, ..."
    )

    def key(self, digest: str) -> str:
        """Its key in the processed bucket, for the version with this digest."""
        return self.file if self.file.startswith(SHARDS_PREFIX) else f"{digest}/{self.file}"


class ShardWriter:
    """Collects rows of one split, and stores a shard under its digest whenever there are enough."""

    def __init__(self, store: ObjectStore, folder: Path, max_rows: int, images: ImageSpec) -> None:
        """The folder is used for the file being written. Of images larger than 3 kB, a shard has fewer rows."""
        self._store, self._path = store, folder / "shard"
        self._max_rows = max(1, max_rows * _ROW_BYTES // max(_ROW_BYTES, math.prod(images.image_shape)))
        self._waiting: list[Tensors] = []
        self._shards: list[Shard] = []
        self.label_counts = np.zeros(len(images.classes), np.int64)

    def add(self, rows: Tensors) -> None:
        """Append rows to the split."""
        self.label_counts += np.bincount(rows["labels"], minlength=len(self.label_counts))
        self._waiting.append(rows)
        if sum(len(each["labels"]) for each in self._waiting) >= self._max_rows:
            self._write(whole_only=True)

    def finish(self) -> tuple[Shard, ...]:
        """Store the remaining rows and return all shards."""
        if self._waiting:
            self._write(whole_only=False)
        return tuple(self._shards)

    def _write(self, whole_only: bool) -> None:
        tensors = {name: np.concatenate([rows[name] for rows in self._waiting]) for name in _TENSORS}
        num_rows = len(tensors["labels"])
        end = num_rows - num_rows % self._max_rows if whole_only else num_rows
        for start in range(0, end, self._max_rows):
            part = {name: tensor[start : min(start + self._max_rows, end)] for name, tensor in tensors.items()}
            save_file({name: np.ascontiguousarray(tensor) for name, tensor in part.items()}, self._path)
            sha256 = sha256_file(self._path)
            key = store_object(self._store, self._path, sha256, ".safetensors", SHARDS_PREFIX)
            size = self._path.stat().st_size
            self._shards.append(Shard(file=key, sha256=sha256, size=size, rows=len(part["labels"])))
            self._path.unlink()
        self._waiting = [{name: tensor[end:] for name, tensor in tensors.items()}] if end < num_rows else []


def channel_totals(images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """For each channel of N x 3 x size x size images: number of pixels, their sum, and the sum of their squares."""
    values = np.arange(256, dtype=np.int64)
    counts = [np.bincount(images[:, channel].ravel(), minlength=256) for channel in range(3)]
    return np.array([[count.sum(), count @ values, count @ values**2] for count in counts])


def mean_and_std(totals: Iterable[Iterable[int]]) -> tuple[Channels, Channels]:
    """Mean and standard deviation per channel, in units of 0 to 1."""
    # Python integers are exact and the result is rounded once, so every machine gets the same value.
    sums = [(max(int(count), 1), int(first), int(second)) for count, first, second in totals]
    mean = [round(first / count / 255, 9) for count, first, _ in sums]
    std = [round(((second * count - first * first) / count**2) ** 0.5 / 255, 9) for count, first, second in sums]
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])


def map_shard(path: Path) -> Tensors:
    """The tensors of a safetensors file, read-only, in one memory map: data is read on first use.

    Format: https://huggingface.co/docs/safetensors (8 bytes header length, JSON header, data). DataError for others.
    """
    try:
        with safe_open(path, "np"):  # validates the header against the file
            mapped = np.memmap(path, np.uint8, "r")
        start = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
        header = json.loads(mapped[8:start].tobytes())
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            first, stop = entry["data_offsets"]
            tensors[name] = mapped[start + first : start + stop].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    except (SafetensorError, ValueError, KeyError) as error:
        raise DataError(f"{path} is not a complete safetensors file: {error}.") from error
    return tensors
