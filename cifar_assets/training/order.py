"""Order of the images: a pure function of seed and epoch, whatever the number of processes."""

import enum

import numpy as np
from numpy.typing import NDArray


class Stream(enum.IntEnum):
    """What random numbers are drawn for. Numbers of different streams are independent."""

    ORDER = 1
    SHIFT = 2
    FLIP = 3
    CUTOUT = 4


def generator(seed: int, stream: Stream, epoch: int = 0) -> np.random.Generator:
    """A counter-based generator that depends on its three arguments alone."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, int(stream), epoch))))


def epoch_batches(seed: int, epoch: int, num_images: int, batch_size: int) -> list[NDArray[np.int64]]:
    """Indices of each step's images: every image once, in batches that differ in size by at most one.

    Even batches leave no small rest, whose batch norm statistics would be noise, and drop nothing.
    """
    order = generator(seed, Stream.ORDER, epoch).permutation(num_images)
    return np.array_split(order, steps_per_epoch(num_images, batch_size))


def steps_per_epoch(num_images: int, batch_size: int) -> int:
    """Optimizer steps in which every image is seen once."""
    return -(-num_images // batch_size)
