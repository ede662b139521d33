"""Splits of a processed dataset as tensors on the training device."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cifar_assets.contracts import IMAGE_SHAPE
from cifar_assets.dataset.versions.processed import ProcessedManifest, read_processed
from cifar_assets.dataset.versions.reader import SplitReader, open_split
from cifar_assets.dataset.versions.splits import SplitName
from cifar_assets.training.spec import JobSpec
from resources.errors import DataError
from resources.object_store import open_store

_STREAM_BATCH = 1024


class Split:
    """One split's images and labels. Small ones lie on the device whole, larger ones are read batch by batch.

    Args:
        reader: gives images by index, from memory-mapped shards.
        device: where images and labels are wanted.
        resident_bytes: the largest size of all images that is kept on the device.
    """

    def __init__(self, reader: SplitReader, device: torch.device, resident_bytes: int):
        self._reader = reader
        self._device = device
        self.labels = torch.from_numpy(np.asarray(reader.labels, dtype=np.int64)).to(device)
        fits = len(reader) * 3 * 32 * 32 <= resident_bytes
        self._resident = self._read(np.arange(len(reader))) if fits else None

    def __len__(self) -> int:
        return len(self._reader)

    def images(self, indices: NDArray[np.int64]) -> Tensor:
        """uint8 images (N, 3, 32, 32) at the positions given."""
        if self._resident is None:
            return self._read(indices)
        return self._resident[torch.from_numpy(indices).to(self._device)]

    def labels_at(self, indices: NDArray[np.int64]) -> Tensor:
        """int64 labels (N) at the positions given."""
        return self.labels[torch.from_numpy(indices).to(self._device)]

    def _read(self, indices: NDArray[np.int64]) -> Tensor:
        images = torch.empty((len(indices), *IMAGE_SHAPE), dtype=torch.uint8, device=self._device)
        for start in range(0, len(indices), _STREAM_BATCH):
            part = self._reader.take(indices[start : start + _STREAM_BATCH])
            images[start : start + len(part)] = torch.from_numpy(part)
        return images


@dataclass(frozen=True)
class TrainingData:
    """A processed dataset, opened."""

    manifest: ProcessedManifest
    train: Split
    validation: Split
    test: Split


def open_data(spec: JobSpec, device: torch.device) -> TrainingData:
    """The spec's dataset, every shard verified by digest. Raises DataError when a split the training needs is empty."""
    processed = open_store(spec.processed_uri)
    manifest = read_processed(processed, spec.dataset_digest)
    cache = Path(spec.execution.cache_folder) if spec.execution.cache_folder else None
    resident_bytes = spec.execution.resident_megabytes << 20

    def split(name: SplitName) -> Split:
        opened = Split(open_split(processed, spec.dataset_digest, name, cache), device, resident_bytes)
        if not len(opened):
            raise DataError(f"{spec.dataset_uri}: its {name} split is empty: a training needs all three splits.")
        return opened

    return TrainingData(manifest, split("train"), split("validation"), split("test"))
