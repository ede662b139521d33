"""Augmentation of whole batches as tensors. What happens to an image is a function of (seed, epoch, image) alone."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from cifar_assets.contracts import IMAGE_SIZE
from cifar_assets.training.order import Stream, generator
from cifar_assets.training.recipes import Recipe


class EpochAugmentation:
    """One epoch's draws for every image of the split; any process applies them to any part of it.

    Args:
        recipe: which augmentations to apply, and how strongly.
        seed: the training's seed.
        epoch: counted from 0.
        num_images: size of the split; draws are indexed by position in it.
    """

    def __init__(self, recipe: Recipe, seed: int, epoch: int, num_images: int):
        self._recipe = recipe
        self._flips = _draw_flips(recipe, seed, epoch, num_images)
        reach = 2 * recipe.translate + 1
        self._shifts = generator(seed, Stream.SHIFT, epoch).integers(0, reach, size=(num_images, 2))
        self._holes = generator(seed, Stream.CUTOUT, epoch).random(size=(num_images, 2))

    def shift_and_flip(self, images: Tensor, indices: NDArray[np.int64]) -> Tensor:
        """uint8 images (N, 3, 32, 32) shifted and mirrored; `indices` are their positions in the split."""
        if self._recipe.translate:
            images = _shift(images, torch.from_numpy(self._shifts[indices]), self._recipe)
        if self._flips is not None:
            flipped = torch.from_numpy(self._flips[indices]).to(images.device).view(-1, 1, 1, 1)
            images = torch.where(flipped, images.flip(3), images)
        return images

    def cut_out(self, images: Tensor, indices: NDArray[np.int64]) -> Tensor:
        """Normalized images (N, 3, size, size) with a square set to 0, the mean, around a random pixel."""
        if not self._recipe.cutout:
            return images
        size = images.shape[-1]
        side = max(1, round(self._recipe.cutout * size / IMAGE_SIZE))
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


def _shift(images: Tensor, shifts: Tensor, recipe: Recipe) -> Tensor:
    reach = recipe.translate
    padding = (reach, reach, reach, reach)
    if recipe.padding == "reflect":
        # reflection has no kernel for uint8
        padded = functional.pad(images.to(torch.float32), padding, mode="reflect").to(torch.uint8)
    else:
        padded = functional.pad(images, padding)
    shifts = shifts.to(images.device)
    steps = torch.arange(IMAGE_SIZE, device=images.device)
    rows = (shifts[:, :1] + steps).view(-1, 1, IMAGE_SIZE, 1)
    columns = (shifts[:, 1:] + steps).view(-1, 1, 1, IMAGE_SIZE)
    which = torch.arange(len(images), device=images.device).view(-1, 1, 1, 1)
    channels = torch.arange(images.shape[1], device=images.device).view(1, -1, 1, 1)
    return padded[which, channels, rows, columns]
