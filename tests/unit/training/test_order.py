import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cifar_assets.training.data import Stream, epoch_batches, generator, steps_per_epoch
from cifar_assets.training.distributed import Processes


@given(st.integers(0, 2**32 - 1), st.integers(0, 500), st.integers(1, 300), st.integers(1, 64), st.integers(1, 5))
def test_every_image_comes_once_in_even_batches(seed: int, epoch: int, images: int, batch: int, processes: int) -> None:
    batches = epoch_batches(seed, epoch, images, batch)
    assert len(batches) == steps_per_epoch(images, batch)
    sizes = {len(indices) for indices in batches}
    assert max(sizes) <= batch
    assert max(sizes) - min(sizes) <= 1
    shares = [Processes(rank, processes).part_of(indices) for indices in batches for rank in range(processes)]
    assert sorted(np.concatenate(shares)) == list(range(images))


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return np.concatenate(epoch_batches(seed, epoch, 50, 8)).tolist()

    assert order(1, 2) == order(1, 2)
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_streams_are_independent() -> None:
    first = {tuple(generator(5, stream, 1).integers(0, 1000, 4).tolist()) for stream in Stream}
    assert len(first) == len(Stream)
