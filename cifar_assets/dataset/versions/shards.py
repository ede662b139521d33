"""Shards: safetensors files that hold images of a split, and where each of them came from."""

import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from safetensors.numpy import save_file

from cifar_assets.contracts import CLASSES, IMAGE_SHAPE
from cifar_assets.dataset.objects import store_object
from resources.digests import sha256_file
from resources.errors import DataError
from resources.object_store import ObjectStore

SHARDS_PREFIX = "shards/"
TENSORS = ("images", "labels", "digests", "objects", "rows")
_DTYPES = {"U8": np.dtype("u1"), "I32": np.dtype("<i4"), "I64": np.dtype("<i8")}


class Shard(BaseModel):
    """One stored file of a processed version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str = Field(description="Key in the processed bucket; of kind cifar10-processed/1, below the version.")
    sha256: str
    size: int = Field(description="Bytes.")
    rows: int
    objects: tuple[int, ...] = Field(
        default=(), description="Positions in the raw version of the objects that the rows name by 0, 1, ..."
    )

    def key(self, digest: str) -> str:
        """Its key in the processed bucket, as a file of the version with the digest."""
        return self.file if self.file.startswith(SHARDS_PREFIX) else f"{digest}/{self.file}"


@dataclass(frozen=True)
class Rows:
    """Prepared images and where they came from; equal lengths."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    digests: NDArray[np.uint8]
    """N x 32: sha256 of the pixels."""
    objects: NDArray[np.int32]
    """Number of the object in its part."""
    rows: NDArray[np.int64]
    """Row in that object."""
    source_splits: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, which: NDArray[np.bool_] | slice) -> "Rows":
        """The rows flagged, or in the slice."""
        return Rows(**{item.name: getattr(self, item.name)[which] for item in fields(self)})

    @staticmethod
    def join(parts: "list[Rows]") -> "Rows":
        """All rows, in order."""
        names = [item.name for item in fields(Rows)]
        return Rows(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


@dataclass
class ShardWriter:
    """Collects rows of one split, and stores a shard under its digest whenever enough are there."""

    store: ObjectStore
    folder: Path
    """For the file being written."""
    max_rows: int
    label_counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(CLASSES), np.int64))
    _waiting: list[Rows] = field(default_factory=list)
    _count: int = 0
    _shards: list[Shard] = field(default_factory=list)

    def add(self, rows: Rows) -> None:
        """Append rows to the split."""
        if not len(rows):
            return
        self.label_counts += np.bincount(rows.labels, minlength=len(CLASSES))
        self._waiting.append(rows)
        self._count += len(rows)
        if self._count >= self.max_rows:
            self._write(rest=self._count % self.max_rows)

    def finish(self) -> tuple[Shard, ...]:
        """Store what is left and give all shards."""
        if self._count:
            self._write(rest=0)
        return tuple(self._shards)

    def _write(self, rest: int) -> None:
        """Store all that waits but for the last `rest` rows."""
        rows = Rows.join(self._waiting)
        end = len(rows) - rest
        path = self.folder / "shard"
        for start in range(0, end, self.max_rows):
            part = rows.take(slice(start, min(start + self.max_rows, end)))
            save_file({name: np.ascontiguousarray(getattr(part, name)) for name in TENSORS}, path)
            sha256 = sha256_file(path)
            key = store_object(self.store, path, sha256, ".safetensors", SHARDS_PREFIX)
            self._shards.append(Shard(file=key, sha256=sha256, size=path.stat().st_size, rows=len(part)))
            path.unlink()
        self._waiting, self._count = [rows.take(slice(end, None))] if rest else [], rest


def map_shard(path: Path) -> dict[str, NDArray]:
    """The tensors of a safetensors file, read-only, in one memory map: nothing is read until it is used.

    Format: https://huggingface.co/docs/safetensors (8 bytes header length, JSON header, data). Raises DataError when
    the file is no such file or shorter than its header says.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size:
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        mapped = np.memmap(path, np.uint8, "r", 8 + length) if size > 8 + length else np.empty(0, np.uint8)
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, stop = entry["data_offsets"]
            dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
            if not all(type(number) is int and number >= 0 for number in (start, stop, *shape)):
                raise ValueError(f"tensor {name} has an impossible size")
            if not start <= stop <= len(mapped) or dtype.itemsize * math.prod(shape) != stop - start:
                raise ValueError(f"tensor {name} lies outside the file")
            tensors[name] = mapped[start:stop].view(dtype).reshape(shape)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is not a complete safetensors file: {error}.") from error
    return tensors


def check_images(tensors: dict[str, NDArray], rows: int, name: str) -> None:
    """DataError when a shard's tensors are not `rows` images and labels."""
    images, labels = tensors.get("images"), tensors.get("labels")
    if images is None or labels is None or images.shape != (rows, *IMAGE_SHAPE) or labels.shape != (rows,):
        found = {key: value.shape for key, value in tensors.items()}
        raise DataError(f"{name}: expected {rows} images and labels, got {found}.")
