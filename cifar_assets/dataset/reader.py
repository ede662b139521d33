"""Reading a split of a processed version: memory-mapped, verified once, several shards behaving as one array."""

import logging
import os
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cifar_assets.contracts import IMAGE_SHAPE
from cifar_assets.dataset.processed import ProcessedManifest, read_processed
from cifar_assets.dataset.shards import Shard, check_images, map_shard
from cifar_assets.dataset.splits import SplitName
from cifar_assets.digests import sha256_file
from cifar_assets.errors import IntegrityError, ObjectNotFoundError
from cifar_assets.object_store import ObjectStore

logger = logging.getLogger(__name__)


class SplitReader:
    """The images of one split, in stored order.

    Pixels stay on disk until they are taken, so that a split may be larger than memory; labels (8 bytes an image) and
    digests (32 bytes an image, mapped) do not.
    """

    def __init__(self, manifest: ProcessedManifest, split: SplitName, shards: list[Path], rows: Path):
        self.manifest = manifest
        self.split = split
        self._parts: list[NDArray[np.uint8]] = []
        labels = [np.empty(0, np.int64)]
        for path, shard in zip(shards, manifest.shards[split], strict=True):
            tensors = map_shard(path)
            check_images(tensors, shard.rows, str(path))
            self._parts.append(tensors["images"])
            labels.append(np.asarray(tensors["labels"]))
        self.labels: NDArray[np.int64] = np.concatenate(labels)
        self._starts = np.concatenate([[0], np.cumsum([len(part) for part in self._parts])]).astype(np.int64)
        origin = map_shard(rows)
        self.digests: NDArray[np.uint8] = origin["digests"]
        self.objects: NDArray[np.int32] = origin["objects"]
        self.rows: NDArray[np.int64] = origin["rows"]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> NDArray[np.uint8]:
        """All images, N x 3 x 32 x 32: the memory map itself where there is one shard, otherwise a copy in memory."""
        if len(self._parts) == 1:
            return self._parts[0]
        return np.concatenate([np.empty((0, *IMAGE_SHAPE), np.uint8), *self._parts])

    def take(self, indices: NDArray[np.integer] | list[int]) -> NDArray[np.uint8]:
        """Copies of the images with the given indices, in that order; IndexError outside 0 to len - 1."""
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"{self.split} has {len(self)} images; asked for {wanted.min()} to {wanted.max()}")
        result = np.empty((len(wanted), *IMAGE_SHAPE), np.uint8)
        owner = np.searchsorted(self._starts, wanted, side="right") - 1
        for number in np.unique(owner):
            mine = np.flatnonzero(owner == number)
            result[mine] = self._parts[number][wanted[mine] - self._starts[number]]
        return result

    def digest(self, index: int) -> str:
        """Pixel digest of one image, hex."""
        return self.digests[index].tobytes().hex()


def open_split(processed: ObjectStore, digest: str, split: SplitName, cache: Path | None = None) -> SplitReader:
    """Open a split of the version with the given digest.

    `processed` is the store rooted at the processed bucket. Where it is a folder, its files are mapped in place;
    otherwise shards are copied to `cache` once (a temporary folder by default). Every file's sha256 is checked before
    it is first used; IntegrityError when one was changed.
    """
    manifest = read_processed(processed, digest)
    folder = _cache_folder(cache)
    shards = [_verified(processed, digest, shard, folder) for shard in manifest.shards[split]]
    return SplitReader(manifest, split, shards, _verified(processed, digest, manifest.rows[split], folder))


def open_rows(processed: ObjectStore, digest: str, split: SplitName) -> dict[str, NDArray[np.integer]]:
    """Where each image of a split came from, without its pixels: digests, labels, objects, rows."""
    shard = read_processed(processed, digest).rows[split]
    return map_shard(_verified(processed, digest, shard, _cache_folder(None)))


def _cache_folder(cache: Path | None) -> Path:
    return cache if cache is not None else Path(tempfile.gettempdir(), f"cifar-shards-{os.getuid()}")


def _verified(processed: ObjectStore, digest: str, shard: Shard, cache: Path) -> Path:
    key = f"{digest}/{shard.file}"
    if not processed.exists(key):
        raise ObjectNotFoundError(f"{processed.uri(key)}: no such object: materialize the processed dataset again.")
    local = processed.local_path(key)
    if local is None:
        local = cache / digest / shard.file
        if not _has_digest(local, shard):
            processed.download_verified(key, shard.sha256, local)
        return local
    if not _has_digest(local, shard):
        raise IntegrityError(
            f"{processed.uri(key)} does not have sha256 {shard.sha256}: it was changed or cut off. Delete it and "
            "materialize the processed dataset again."
        )
    return local


def _has_digest(path: Path, shard: Shard) -> bool:
    return path.is_file() and path.stat().st_size == shard.size and sha256_file(path) == shard.sha256
