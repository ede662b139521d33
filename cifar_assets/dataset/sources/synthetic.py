"""Draws ten classes of CIFAR-sized shapes from a seed, so that everything runs without a network.

Shapes vary in position, size and color over a noisy, tinted background, so that a linear model or an untrained network
fails while a small convolutional network learns them within a minute. Mirroring a picture keeps its class. Only integer
arithmetic and numpy's frozen legacy generator are used: a seed gives the same bytes on every machine.
"""

import numpy as np
from numpy.typing import NDArray

from cifar_assets.contracts import CLASSES

TRAIN_ROWS = 6000
TEST_ROWS = 1000
_BATCH = 1000
_STROKE = 3
_SIDE = 32


def draw_split(
    seed: int, split: str, rows: int, num_classes: int = len(CLASSES)
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (rows x 3 x 32 x 32) and labels of the "train" or "test" split, every class equally often."""
    random = np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, 1 if split == "test" else 0])
    labels = random.permutation(np.arange(rows) % num_classes).astype(np.int64)
    parts = [_draw(random, labels[start : start + _BATCH]) for start in range(0, rows, _BATCH)]
    images = np.concatenate(parts) if parts else np.empty((0, 3, _SIDE, _SIDE), np.uint8)
    return images, labels


def _draw(random: np.random.RandomState, labels: NDArray[np.int64]) -> NDArray[np.uint8]:
    count = len(labels)
    radius = random.randint(8, 12, size=(count, 1, 1))
    center = random.randint(13, 19, size=(2, count, 1, 1))
    axis = np.arange(_SIDE)
    masks = _shapes(axis[None, None, :] - center[0], axis[None, :, None] - center[1], radius)
    mask = np.take_along_axis(masks, labels[None, :, None, None], axis=0)[0]

    ground = random.randint(80, 176, size=(count, 3, 1, 1))
    # The shape differs slightly from the background in each channel, in a random direction per picture.
    sign = np.where(random.randint(0, 2, size=(count, 3, 1, 1)) == 1, 1, -1)
    contrast = random.randint(40, 72, size=(count, 3, 1, 1)) * sign
    noise = random.randint(-16, 17, size=(count, 3, _SIDE, _SIDE))
    images = ground + contrast * mask[:, None] + noise
    return np.clip(images, 0, 255).astype(np.uint8)


def _shapes(x: NDArray[np.int64], y: NDArray[np.int64], r: NDArray[np.int64]) -> NDArray[np.bool_]:
    """10 x N x 32 x 32: the shape of every class around the center, in label order."""
    flat, far = np.maximum(abs(x), abs(y)), x * x + y * y
    box, disc = flat <= r, far <= r * r
    classes = (
        disc,
        disc & (far >= (r - _STROKE) * (r - _STROKE)),
        box,
        box & (flat > r - _STROKE),
        (y <= r) & (2 * abs(x) <= y + r),
        (y >= -r) & (2 * abs(x) <= r - y),
        box & ((abs(x) < _STROKE) | (abs(y) < _STROKE)),
        box & ((abs(x - y) < _STROKE) | (abs(x + y) < _STROKE)),
        box & ((y + r) // _STROKE % 2 == 0),
        box & (abs(x) // 2 % 2 == 0),
    )
    return np.stack(np.broadcast_arrays(*classes))
