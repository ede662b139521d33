"""Shards: safetensors files that hold the images of a split, and the file that says where each image came from."""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from safetensors.numpy import save_file

from cifar_assets.contracts import CLASSES, IMAGE_SHAPE
from cifar_assets.digests import sha256_file
from cifar_assets.errors import DataError

_DTYPES = {"U8": np.dtype("u1"), "I32": np.dtype("<i4"), "I64": np.dtype("<i8")}


class Shard(BaseModel):
    """One stored file of a processed version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str = Field(description="Name below the version's folder.")
    sha256: str
    size: int = Field(description="Bytes.")
    rows: int


@dataclass(frozen=True)
class Rows:
    """Prepared images and where they came from; equal lengths."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    digests: NDArray[np.uint8]
    """N x 32: sha256 of the pixels."""
    objects: NDArray[np.int32]
    """Position in the raw manifest's objects."""
    rows: NDArray[np.int64]
    """Row in that object."""
    source_splits: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, flags: NDArray[np.bool_]) -> "Rows":
        """The rows flagged."""
        if flags.all():
            return self
        return Rows(**{item.name: getattr(self, item.name)[flags] for item in fields(self)})


@dataclass
class ShardWriter:
    """Collects the rows of one split and writes a shard whenever enough are there."""

    folder: Path
    split: str
    max_rows: int
    label_counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(CLASSES), np.int64))
    _waiting: list[tuple[NDArray[np.uint8], NDArray[np.int64]]] = field(default_factory=list)
    _count: int = 0
    _shards: list[Shard] = field(default_factory=list)
    _origins: list[dict[str, NDArray]] = field(default_factory=list)

    def add(self, rows: Rows) -> None:
        """Append rows to the split."""
        if not len(rows):
            return
        self.label_counts += np.bincount(rows.labels, minlength=len(CLASSES))
        self._origins.append(
            {"digests": rows.digests, "labels": rows.labels, "objects": rows.objects, "rows": rows.rows}
        )
        self._waiting.append((rows.images, rows.labels))
        self._count += len(rows)
        while self._count >= self.max_rows:
            self._write(self.max_rows)

    def finish(self) -> tuple[Shard, ...]:
        """Write what is left and give all shards."""
        if self._count:
            self._write(self._count)
        return tuple(self._shards)

    def write_rows(self) -> Shard:
        """Write where each row of the split came from."""
        empty = {
            "digests": np.empty((0, 32), np.uint8),
            "labels": np.empty(0, np.int64),
            "objects": np.empty(0, np.int32),
            "rows": np.empty(0, np.int64),
        }
        joined = {name: np.concatenate([none, *(part[name] for part in self._origins)]) for name, none in empty.items()}
        return self._save(f"{self.split}.rows.safetensors", joined)

    def _write(self, count: int) -> None:
        images = np.concatenate([part[0] for part in self._waiting])
        labels = np.concatenate([part[1] for part in self._waiting])
        name = f"{self.split}-{len(self._shards):05d}.safetensors"
        self._shards.append(self._save(name, {"images": images[:count], "labels": labels[:count]}))
        self._count = len(labels) - count
        self._waiting = [(images[count:], labels[count:])] if self._count else []

    def _save(self, name: str, tensors: dict[str, NDArray]) -> Shard:
        path = self.folder / name
        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, path)
        return Shard(file=name, sha256=sha256_file(path), size=path.stat().st_size, rows=len(tensors["labels"]))


def map_shard(path: Path) -> dict[str, NDArray]:
    """The tensors of a safetensors file as read-only memory maps: nothing is read until it is used.

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
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, stop = entry["data_offsets"]
            dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
            if 8 + length + stop > size or dtype.itemsize * int(np.prod(shape)) != stop - start:
                raise ValueError(f"tensor {name} lies outside the file")
            if start == stop:
                tensors[name] = np.empty(shape, dtype)
            else:
                tensors[name] = np.memmap(path, dtype, "r", 8 + length + start, shape)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no complete safetensors file: {error}.") from error
    return tensors


def check_images(tensors: dict[str, NDArray], rows: int, name: str) -> None:
    """DataError when a shard's tensors are not `rows` images and labels."""
    images, labels = tensors.get("images"), tensors.get("labels")
    if images is None or labels is None or images.shape != (rows, *IMAGE_SHAPE) or labels.shape != (rows,):
        found = {key: value.shape for key, value in tensors.items()}
        raise DataError(f"{name}: expected {rows} images and labels, got {found}.")
