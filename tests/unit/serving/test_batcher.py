"""The micro-batcher: what runs together, when, and what happens when there is too much or something fails."""

import asyncio
import threading
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from cifar_assets.serving.answers import BusyError, GoneError, Logits, RequestError
from cifar_assets.serving.batcher import MicroBatcher
from cifar_assets.serving.metrics import REGISTRY


class GatedModel:
    """Gives each image's first pixel as its logits, and runs only as often as it is let."""

    def __init__(self, *, is_open: bool = True):
        self.sizes: list[int] = []
        self.alone: list[bool] = []
        self.started = threading.Semaphore(0)
        self.may_run = threading.Semaphore(10**6 if is_open else 0)

    def run(self, images: np.ndarray, is_alone: bool) -> np.ndarray:
        self.alone.append(is_alone)
        self.started.release()
        assert self.may_run.acquire(timeout=200)
        self.sizes.append(len(images))
        if (images == 255).all(axis=(1, 2, 3)).any():
            raise ValueError("a bad image")
        first_pixels = images[:, :1, 0, 0].astype(np.float32)
        return np.repeat(np.where(first_pixels == 254, np.nan, first_pixels), 10, axis=1)


def images(*values: int) -> np.ndarray:
    return np.broadcast_to(np.array(values, np.uint8)[:, None, None, None], (len(values), 3, 32, 32))


def story(
    tell: Callable[[MicroBatcher], Awaitable[None]],
    model: GatedModel,
    *,
    batch_images: int = 8,
    queue_images: int = 20,
    num_threads: int = 1,
) -> None:
    async def run() -> None:
        batcher = MicroBatcher(model.run, batch_images=batch_images, queue_images=queue_images, num_threads=num_threads)
        try:
            await asyncio.wait_for(tell(batcher), 300)
        finally:
            batcher.close()

    asyncio.run(run())


def submit(
    batcher: MicroBatcher, pixels: np.ndarray, *, is_wanted: Callable[[], bool] = lambda: True
) -> "asyncio.Future[Logits]":
    future: asyncio.Future[Logits] = asyncio.get_running_loop().create_future()

    def done(outcome: Logits | Exception) -> None:
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)

    batcher.submit(pixels, done, is_wanted)
    return future


async def first_pixels(future: "asyncio.Future[Logits]") -> list[float]:
    return (await future)[:, 0].tolist()


async def until_started(model: GatedModel) -> None:
    assert await asyncio.to_thread(model.started.acquire, timeout=200)


def test_a_single_request_runs_at_once() -> None:
    async def tell(batcher: MicroBatcher) -> None:
        assert await first_pixels(submit(batcher, images(3, 4))) == [3, 4]

    story(tell, GatedModel())


def test_requests_that_arrive_together_run_together() -> None:
    model = GatedModel()

    async def tell(batcher: MicroBatcher) -> None:
        futures = [submit(batcher, images(value)) for value in range(5)]
        assert [await first_pixels(future) for future in futures] == [[0], [1], [2], [3], [4]]
        assert model.sizes == [5]

    story(tell, model)


def test_requests_that_wait_for_the_model_run_together_in_order() -> None:
    model = GatedModel(is_open=False)

    async def tell(batcher: MicroBatcher) -> None:
        futures = [submit(batcher, images(0))]
        await until_started(model)
        futures += [submit(batcher, images(value, value)) for value in range(1, 6)]
        for _ in range(3):
            model.may_run.release()
        assert [await first_pixels(future) for future in futures] == [[0], [1, 1], [2, 2], [3, 3], [4, 4], [5, 5]]
        assert model.sizes == [1, 8, 2]

    story(tell, model)


def test_a_large_request_runs_in_pieces_and_lets_small_ones_in_between() -> None:
    model = GatedModel(is_open=False)
    order: list[str] = []

    async def tell(batcher: MicroBatcher) -> None:
        large = submit(batcher, images(*range(10)))
        large.add_done_callback(lambda _: order.append("large"))
        await until_started(model)
        small = submit(batcher, images(77))
        small.add_done_callback(lambda _: order.append("small"))
        for _ in range(4):
            model.may_run.release()
        assert await first_pixels(large) == list(range(10))
        assert await first_pixels(small) == [77]
        assert model.sizes == [4, 4, 3]
        assert order == ["small", "large"]

    story(tell, model, batch_images=4)


def test_threads_share_the_queue_and_a_single_run_has_all_of_them() -> None:
    model = GatedModel(is_open=False)

    async def tell(batcher: MicroBatcher) -> None:
        futures = [submit(batcher, images(value)) for value in range(4)]
        for _ in range(2):
            await until_started(model)
        for _ in range(3):
            model.may_run.release()
        assert [await first_pixels(future) for future in futures] == [[0], [1], [2], [3]]
        assert await first_pixels(submit(batcher, images(4))) == [4]
        assert model.sizes == [2, 2, 1]
        assert model.alone == [False, False, True]

    story(tell, model, num_threads=2)


def test_the_parts_of_a_large_request_keep_their_order_with_several_threads() -> None:
    async def tell(batcher: MicroBatcher) -> None:
        futures = [submit(batcher, images(*range(10 * index, 10 * index + 10))) for index in range(3)]
        for index, future in enumerate(futures):
            assert await first_pixels(future) == list(range(10 * index, 10 * index + 10))

    story(tell, GatedModel(), batch_images=3, queue_images=40, num_threads=3)


def count_of_runs() -> list[float]:
    names = ("cifar10_run_seconds_count", "cifar10_batch_images_count", "cifar10_batch_images_sum")
    return [REGISTRY.get_sample_value(name) or 0.0 for name in names]


def test_runs_and_waiting_images_are_counted() -> None:
    before = count_of_runs()

    async def tell(batcher: MicroBatcher) -> None:
        await submit(batcher, images(*range(10)))
        after = count_of_runs()
        assert [now - then for now, then in zip(after, before, strict=True)] == [3, 3, 10]
        assert REGISTRY.get_sample_value("cifar10_queue_images") == 0
        submit(batcher, images(1, 2))
        assert REGISTRY.get_sample_value("cifar10_queue_images") == 2

    story(tell, GatedModel(), batch_images=4)


def test_a_full_queue_refuses_with_retry_after() -> None:
    model = GatedModel(is_open=False)

    async def tell(batcher: MicroBatcher) -> None:
        first = submit(batcher, images(0))
        await until_started(model)
        waiting = [submit(batcher, images(*[1] * 10)), submit(batcher, images(*[2] * 5))]
        with pytest.raises(BusyError, match="room for 9 images in the queue of 20, got 15 waiting") as caught:
            submit(batcher, images(*[3] * 9))
        assert caught.value.headers == (("Retry-After", "1"),)
        last = submit(batcher, images(*[4] * 5))
        for _ in range(10):
            model.may_run.release()
        for future, size in zip([first, *waiting, last], (1, 10, 5, 5), strict=True):
            assert len(await future) == size

    story(tell, model)


def test_a_part_of_the_queue_is_kept_for_small_requests() -> None:
    async def tell(batcher: MicroBatcher) -> None:
        submit(batcher, images(*[1] * 10))
        with pytest.raises(BusyError):
            submit(batcher, images(*[1] * 9))
        submit(batcher, images(*[1] * 8))

    story(tell, GatedModel(), batch_images=8, queue_images=20)


def test_a_request_larger_than_the_queue_is_taken_when_nothing_waits() -> None:
    async def tell(batcher: MicroBatcher) -> None:
        assert len(await submit(batcher, images(*range(30)))) == 30

    story(tell, GatedModel(), queue_images=20)


def test_a_request_whose_client_has_gone_is_left_out() -> None:
    model = GatedModel(is_open=False)

    async def tell(batcher: MicroBatcher) -> None:
        first = submit(batcher, images(0))
        await until_started(model)
        gone = submit(batcher, images(1), is_wanted=lambda: False)
        kept = submit(batcher, images(2))
        for _ in range(2):
            model.may_run.release()
        assert await first_pixels(first) + await first_pixels(kept) == [0, 2]
        with pytest.raises(GoneError):
            await gone
        assert model.sizes == [1, 1]
        assert REGISTRY.get_sample_value("cifar10_queue_images") == 0

    story(tell, model)


def test_a_failing_batch_fails_its_requests_and_no_others() -> None:
    model = GatedModel(is_open=False)

    async def tell(batcher: MicroBatcher) -> None:
        bad = submit(batcher, images(*[255] * 10))
        await until_started(model)
        good = submit(batcher, images(7))
        for _ in range(3):
            model.may_run.release()
        with pytest.raises(ValueError, match="a bad image"):
            await bad
        assert await first_pixels(good) == [7]
        assert model.sizes == [4, 1]
        assert REGISTRY.get_sample_value("cifar10_queue_images") == 0

    story(tell, model, batch_images=4)


def test_an_answer_that_is_not_finite_fails_its_own_request_only() -> None:
    async def tell(batcher: MicroBatcher) -> None:
        broken, sound = submit(batcher, images(254)), submit(batcher, images(2))
        assert await first_pixels(sound) == [2]
        with pytest.raises(RequestError, match="not finite"):
            await broken

    story(tell, GatedModel())


def test_many_requests_each_get_their_own_answers() -> None:
    async def tell(batcher: MicroBatcher) -> None:
        values = [[index % 250] * (1 + index % 7) for index in range(300)]
        found = await asyncio.gather(*[first_pixels(submit(batcher, images(*value))) for value in values])
        assert found == values

    for num_threads in (1, 3):
        story(tell, GatedModel(), queue_images=10_000, num_threads=num_threads)
