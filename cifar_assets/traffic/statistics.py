"""Simple properties of an image, to tell in words how the pictures that a model gets differ from its dataset."""

import numpy as np
from numpy.typing import NDArray

STATISTICS = ("brightness", "contrast", "saturation", "sharpness")
_LUMA = np.asarray([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue in the luma of ITU-R BT.601."""
_PIECE = 512
"""Images that are in memory as floats at a time."""


def image_statistics(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """One row (N, 4) for each image (N, 3, height, width), in the order of STATISTICS.

    Brightness is the mean of the luma from 0 to 1, contrast its standard deviation. Saturation is the mean of HSV's.
    Sharpness is the standard deviation of the luma's Laplacian (Pech-Pacheco et al. 2000), divided by the contrast, so
    that it does not change with brightness or contrast.
    """
    pieces = [_of_piece(images[start : start + _PIECE]) for start in range(0, len(images), _PIECE)]
    return np.concatenate([np.empty((0, len(STATISTICS)), np.float32), *pieces])


def _of_piece(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    highest = images.max(axis=1).astype(np.float32)
    saturation = (highest - images.min(axis=1)) / np.maximum(highest, 1)
    luma = np.tensordot(images.astype(np.float32), _LUMA / 255, axes=(1, 0))
    inner = luma[:, 1:-1, 1:-1]
    around = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:]
    contrast = luma.std(axis=(1, 2))
    sharpness = (around - 4 * inner).std(axis=(1, 2)) / np.maximum(contrast, 1e-3)
    columns = [luma.mean(axis=(1, 2)), contrast, saturation.mean(axis=(1, 2)), sharpness]
    return np.stack(columns, axis=1).astype(np.float32)
