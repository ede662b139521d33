"""Reads a split of a processed version: memory-mapped, verified once, with several shards presented as one array."""

import os
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cifar_assets.dataset.versions.processed import ProcessedManifest, read_processed
from cifar_assets.dataset.versions.shards import Shard, Tensors, map_shard
from cifar_assets.dataset.versions.splits import SplitName
from resources.digests import sha256_file
from resources.errors import IntegrityError, ObjectNotFoundError
from resources.object_store import ObjectStore

_MOST_OPEN = 64
"""Number of shards mapped at a time: each keeps a file open."""

_EMPTY: Tensors = {
    "labels": np.empty(0, np.int64),
    "digests": np.empty((0, 32), np.uint8),
    "objects": np.empty(0, np.int32),
    "rows": np.empty(0, np.int64),
}


class SplitReader:
    """The images of one split, in stored order.

    Pixels stay on disk until they are read, so a split may be larger than memory. The record of each image (52 bytes)
    is in memory: label, digest, position of its object in the raw version, and row in that object.
    """

    def __init__(self, manifest: ProcessedManifest, split: SplitName, shards: list[Path], rows: Path | None = None):
        self.manifest = manifest
        self.split: SplitName = split
        self._paths = shards
        self._map = lru_cache(_MOST_OPEN)(lambda number: map_shard(shards[number])["images"])
        known = [_EMPTY]
        for path, shard in zip(shards, manifest.shards[split], strict=True) if rows is None else ():
            tensors = _known(path)
            known.append({**tensors, "objects": np.asarray(shard.objects, np.int32)[tensors["objects"]]})
        if rows is not None:
            known.append(_known(rows))
        self.labels, self.digests, self.objects, self.rows = (
            np.concatenate([each[name] for each in known]) for name in _EMPTY
        )
        self._starts = np.cumsum([0, *(shard.rows for shard in manifest.shards[split])])

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> NDArray[np.uint8]:
        """All images, N x 3 x size x size: the memory map itself where there is one shard, otherwise a copy."""
        return self._map(0) if len(self._paths) == 1 else self.take(np.arange(len(self)))

    def take(self, indices: NDArray[np.integer] | list[int]) -> NDArray[np.uint8]:
        """Copies of the images with the given indices, in that order; IndexError outside 0 to len - 1."""
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"{self.split} has {len(self)} images; asked for {wanted.min()} to {wanted.max()}")
        result = np.empty((len(wanted), *self.manifest.image_shape), np.uint8)
        owner = np.searchsorted(self._starts, wanted, side="right") - 1
        by_owner = np.argsort(owner, kind="stable")
        for mine in np.split(by_owner, np.flatnonzero(np.diff(owner[by_owner])) + 1):
            if len(mine):
                number = int(owner[mine[0]])
                result[mine] = self._map(number)[wanted[mine] - self._starts[number]]
        return result

    def spread(self, number: int) -> NDArray[np.int64]:
        """Indices of up to so many images, spread evenly over the split, the same ones each time."""
        return np.unique(np.linspace(0, len(self) - 1, min(number, len(self))).astype(np.int64))

    def digest(self, index: int) -> str:
        """Pixel digest of one image, hex."""
        return self.digests[index].tobytes().hex()


def open_split(processed: ObjectStore, digest: str, split: SplitName, cache: Path | None = None) -> SplitReader:
    """Open a split of the version with the given digest.

    `processed` is the store rooted at the processed bucket. If it is a folder, its files are mapped in place; otherwise
    shards are copied to `cache` once (a temporary folder by default). Every file's sha256 is checked before its first
    use; IntegrityError when one was changed.
    """
    manifest = read_processed(processed, digest)
    folder = cache if cache is not None else Path(tempfile.gettempdir(), f"cifar-shards-{os.getuid()}")
    shards = [_verified(processed, shard.key(digest), shard, folder) for shard in manifest.shards[split]]
    old = manifest.rows.get(split)
    return SplitReader(manifest, split, shards, _verified(processed, old.key(digest), old, folder) if old else None)


def _known(path: Path) -> Tensors:
    tensors = map_shard(path)
    return {name: np.array(tensors[name]) for name in _EMPTY}  # copies, because a map would keep the file open


def _verified(processed: ObjectStore, key: str, shard: Shard, cache: Path) -> Path:
    if not processed.exists(key):
        raise ObjectNotFoundError(f"{processed.uri(key)} does not exist: materialize the processed dataset again.")
    local = processed.local_path(key)
    if local is None:
        local = cache / f"{shard.sha256}.safetensors"
        if _has_digest(local, shard):
            os.utime(local)  # marks it as recently used
        else:
            processed.download_verified(key, shard.sha256, local)
    elif not _has_digest(local, shard):
        raise IntegrityError(
            f"{processed.uri(key)} does not have sha256 {shard.sha256}: it was changed or truncated. Delete it and "
            "materialize the processed dataset again."
        )
    return local


def _has_digest(path: Path, shard: Shard) -> bool:
    return path.is_file() and path.stat().st_size == shard.size and sha256_file(path) == shard.sha256
