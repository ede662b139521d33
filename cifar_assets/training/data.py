"""Training data: the splits of a processed dataset as tensors, the order of their images, and augmentation.

Order and augmentation depend only on (seed, epoch, image), not on the number of processes.
"""

import enum
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from cifar_assets.dataset.versions.processed import ProcessedManifest, read_processed
from cifar_assets.dataset.versions.reader import SplitReader, open_split
from cifar_assets.dataset.versions.splits import SplitName
from cifar_assets.training.recipes import FULL_SIZE, Recipe
from cifar_assets.training.spec import JobSpec
from resources.errors import DataError
from resources.object_store import open_store

_STREAM_BYTES = 3 << 20
_BATCH_IMAGES, _BATCH_PIXELS = 500, 500 * 32 * 32


class TensorSplit:
    """One split's images and labels, on a device.

    A split of up to `resident_bytes` is kept on the device; a larger one is read batch by batch from the mapped shards.
    """

    def __init__(self, reader: SplitReader, device: torch.device, resident_bytes: int):
        self._reader = reader
        self._device = device
        self.labels = torch.from_numpy(np.asarray(reader.labels, dtype=np.int64)).to(device)
        fits = len(reader) * math.prod(reader.manifest.image_shape) <= resident_bytes
        self._resident = self._read(np.arange(len(reader))) if fits else None

    def __len__(self) -> int:
        return len(self._reader)

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""
        return self._reader.manifest.image_size

    def images(self, indices: NDArray[np.int64]) -> Tensor:
        """uint8 images (N, 3, size, size) at the positions given."""
        if self._resident is None:
            return self._read(indices)
        return self._resident[torch.from_numpy(indices).to(self._device)]

    def labels_at(self, indices: NDArray[np.int64]) -> Tensor:
        """int64 labels (N) at the positions given."""
        return self.labels[torch.from_numpy(indices).to(self._device)]

    def _read(self, indices: NDArray[np.int64]) -> Tensor:
        images = torch.empty((len(indices), *self._reader.manifest.image_shape), dtype=torch.uint8, device=self._device)
        step = max(1, _STREAM_BYTES // math.prod(self._reader.manifest.image_shape))
        for start in range(0, len(indices), step):
            part = self._reader.take(indices[start : start + step])
            images[start : start + len(part)] = torch.from_numpy(part)
        return images


@dataclass(frozen=True)
class TrainingData:
    """A processed dataset, opened."""

    manifest: ProcessedManifest
    train: TensorSplit
    validation: TensorSplit
    test: TensorSplit


def open_data(spec: JobSpec, device: torch.device) -> TrainingData:
    """The spec's dataset, every shard verified by digest. Raises DataError when a split the training needs is empty."""
    processed = open_store(spec.processed_uri)
    manifest = read_processed(processed, spec.dataset_digest)
    resident_bytes = spec.execution.resident_megabytes << 20

    def split(name: SplitName) -> TensorSplit:
        opened = TensorSplit(open_split(processed, spec.dataset_digest, name), device, resident_bytes)
        if not len(opened):
            raise DataError(f"{spec.dataset_uri}: its {name} split is empty: a training needs all three splits.")
        return opened

    return TrainingData(manifest, split("train"), split("validation"), split("test"))


class Stream(enum.IntEnum):
    """The purpose of random numbers. Numbers from different streams are independent."""

    ORDER = 1
    SHIFT = 2
    FLIP = 3
    CUTOUT = 4


def generator(seed: int, stream: Stream, epoch: int = 0) -> np.random.Generator:
    """A counter-based generator that depends only on its three arguments."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, int(stream), epoch))))


def epoch_batches(seed: int, epoch: int, num_images: int, batch_size: int) -> list[NDArray[np.int64]]:
    """Indices of each step's images: every image once, in batches that differ in size by at most one.

    Even batches avoid a small last batch, whose batch norm statistics would be noise, without dropping images.
    """
    order = generator(seed, Stream.ORDER, epoch).permutation(num_images)
    return np.array_split(order, steps_per_epoch(num_images, batch_size))


def batch_images(image_size: int) -> int:
    """Number of images in a batch that is only evaluated: fewer of larger images, so that memory is bounded."""
    return max(16, min(_BATCH_IMAGES, _BATCH_PIXELS // image_size**2))


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Number of optimizer steps per epoch."""
    return -(-num_images // batch_size)


def resolution(recipe: Recipe, step: int, steps_per_epoch: int, image_size: int) -> int:
    """Size in pixels of the images, of full size `image_size`, at a step counted from 0 over the whole training."""
    progress = step / (recipe.epochs * steps_per_epoch)
    return next(phase.size_of(image_size) for phase in reversed(recipe.resolutions) if progress >= phase.start)


def resize(images: Tensor, size: int) -> Tensor:
    """Float images scaled down to `size` pixels with antialiasing; unchanged if they already have that size."""
    if images.shape[-1] == size:
        return images
    if images.shape[-1] % size == 0:
        return functional.avg_pool2d(images, images.shape[-1] // size)
    return functional.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


class EpochAugmentation:
    """One epoch's random draws for every image of the split, by position; usable for any part of it."""

    def __init__(self, recipe: Recipe, seed: int, epoch: int, num_images: int, image_size: int):
        self._recipe = recipe
        self._reach = recipe.reach(image_size)
        self._flips = _draw_flips(recipe, seed, epoch, num_images)
        self._shifts = generator(seed, Stream.SHIFT, epoch).integers(0, 2 * self._reach + 1, size=(num_images, 2))
        self._holes = generator(seed, Stream.CUTOUT, epoch).random(size=(num_images if recipe.cutout else 0, 2))

    def shift_and_flip(self, images: Tensor, indices: NDArray[np.int64]) -> Tensor:
        """uint8 images of full size, shifted and mirrored; `indices` are their positions in the split."""
        if self._reach:
            images = _shift(images, torch.from_numpy(self._shifts[indices]), self._reach, self._recipe.padding)
        if self._flips is not None:
            flipped = torch.from_numpy(self._flips[indices]).to(images.device).view(-1, 1, 1, 1)
            images = torch.where(flipped, images.flip(3), images)
        return images

    def cut_out(self, images: Tensor, indices: NDArray[np.int64]) -> Tensor:
        """Normalized images (N, 3, size, size) with a square set to 0, the mean, around a random pixel."""
        if not self._recipe.cutout:
            return images
        size = images.shape[-1]
        side = max(1, round(self._recipe.cutout * size / FULL_SIZE))
        corner = torch.from_numpy((self._holes[indices] * size).astype(np.int64)).to(images.device) - side // 2
        pixels = torch.arange(size, device=images.device)
        inside = (pixels >= corner.unsqueeze(2)) & (pixels < corner.unsqueeze(2) + side)
        hole = inside[:, 0, :, None] & inside[:, 1, None, :]
        return images.masked_fill(hole.unsqueeze(1), 0.0)


def _draw_flips(recipe: Recipe, seed: int, epoch: int, num_images: int) -> NDArray[np.bool_] | None:
    """Alternating flips show each image both ways in any two epochs (Jordan, airbench, arXiv:2404.00498)."""
    if recipe.flip == "none":
        return None
    if recipe.flip == "random":
        return generator(seed, Stream.FLIP, epoch).integers(0, 2, size=num_images).astype(bool)
    first = generator(seed, Stream.FLIP).integers(0, 2, size=num_images)
    return (first + epoch) % 2 == 1


def _shift(images: Tensor, shifts: Tensor, reach: int, fill: Literal["zero", "reflect"]) -> Tensor:
    padding = (reach, reach, reach, reach)
    if fill == "reflect":
        # reflection padding has no uint8 kernel
        padded = functional.pad(images.to(torch.float32), padding, mode="reflect").to(torch.uint8)
    else:
        padded = functional.pad(images, padding)
    shifts = shifts.to(images.device)
    steps = torch.arange(images.shape[-1], device=images.device)
    rows = (shifts[:, :1] + steps)[:, None, :, None]
    columns = (shifts[:, 1:] + steps)[:, None, None]
    which = torch.arange(len(images), device=images.device).view(-1, 1, 1, 1)
    channels = torch.arange(images.shape[1], device=images.device).view(1, -1, 1, 1)
    return padded[which, channels, rows, columns]
