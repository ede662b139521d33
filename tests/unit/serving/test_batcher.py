"""The micro-batcher: what runs together, when, and what happens when there is too much or something fails."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import pytest
from prometheus_client import REGISTRY

from cifar_assets.serving.batcher import MicroBatcher
from cifar_assets.serving.classifier import NotFiniteError
from cifar_assets.serving.faults import BusyError


class GatedModel:
    """Gives each image's first pixel as its logits, and runs only as often as it is let."""

    def __init__(self, *, is_open: bool = True):
        self.sizes: list[int] = []
        self.started = threading.Semaphore(0)
        self.may_run = threading.Semaphore(10**6 if is_open else 0)

    def run(self, images: np.ndarray) -> np.ndarray:
        self.started.release()
        assert self.may_run.acquire(timeout=20)
        self.sizes.append(len(images))
        if (images == 255).all(axis=(1, 2, 3)).any():
            raise ValueError("a bad image")
        return np.repeat(images[:, :1, 0, 0].astype(np.float32), 10, axis=1)


def images(*values: int) -> np.ndarray:
    return np.broadcast_to(np.array(values, np.uint8)[:, None, None, None], (len(values), 3, 32, 32))


def make_batcher(
    model: GatedModel, *, batch_images: int = 8, batch_delay: float = 30.0, queue_images: int = 20
) -> MicroBatcher:
    """By default an image would wait half a minute for company: a test that needs the delay to pass would hang."""
    return MicroBatcher(model.run, batch_images=batch_images, batch_delay=batch_delay, queue_images=queue_images)


def submit(batcher: MicroBatcher, images: np.ndarray) -> "Future[np.ndarray]":
    with batcher.arriving() as arrival:
        return arrival.submit(images)


def first_pixels(future) -> list[float]:
    return future.result(timeout=20)[:, 0].tolist()


def test_a_lone_request_waits_for_nothing():
    model = GatedModel()
    batcher = make_batcher(model)
    assert first_pixels(submit(batcher, images(3, 4))) == [3, 4]
    batcher.close()


def test_a_batch_waits_for_requests_on_their_way_until_the_last_has_come():
    model = GatedModel()
    batcher = make_batcher(model)
    with batcher.arriving() as earlier, batcher.arriving() as later, batcher.arriving():
        first = earlier.submit(images(1))
        second = later.submit(images(2))
        assert not first.done()
    assert first_pixels(first) + first_pixels(second) == [1, 2]
    assert model.sizes == [2]
    batcher.close()


def test_a_request_that_has_come_is_not_waited_for_though_its_mark_remains():
    batcher = make_batcher(GatedModel())
    with batcher.arriving() as arrival:
        assert first_pixels(arrival.submit(images(5))) == [5]
    batcher.close()


def test_a_full_batch_waits_for_nobody():
    model = GatedModel()
    batcher = make_batcher(model, batch_images=4)
    with batcher.arriving():
        futures = [submit(batcher, images(value)) for value in range(4)]
        assert [first_pixels(future) for future in futures] == [[0], [1], [2], [3]]
    assert model.sizes == [4]
    batcher.close()


def test_a_batch_starts_at_its_deadline_though_somebody_is_on_the_way():
    model = GatedModel()
    batcher = make_batcher(model, batch_delay=0.01)
    with batcher.arriving():
        assert first_pixels(submit(batcher, images(9))) == [9]
    batcher.close()


def test_what_waits_while_the_model_runs_goes_together_afterwards_in_order():
    model = GatedModel(is_open=False)
    batcher = make_batcher(model)
    futures = [submit(batcher, images(0))]
    assert model.started.acquire(timeout=20)
    futures += [submit(batcher, images(value, value)) for value in range(1, 6)]
    for _ in range(3):
        model.may_run.release()
    assert [first_pixels(future) for future in futures] == [[0], [1, 1], [2, 2], [3, 3], [4, 4], [5, 5]]
    assert model.sizes == [1, 8, 2]
    batcher.close()


def count_of_runs() -> list[float]:
    names = ("cifar10_run_seconds_count", "cifar10_batch_images_count", "cifar10_batch_images_sum")
    return [REGISTRY.get_sample_value(name) or 0.0 for name in names]


def test_a_request_larger_than_a_batch_runs_in_pieces():
    model = GatedModel()
    batcher = make_batcher(model, batch_images=4)
    before = count_of_runs()
    assert first_pixels(submit(batcher, images(*range(10)))) == list(range(10))
    assert model.sizes == [4, 4, 2]
    batcher.close()
    assert [after - count for after, count in zip(count_of_runs(), before, strict=True)] == [3, 3, 10]


def test_a_full_queue_refuses_and_takes_again_when_there_is_room():
    model = GatedModel(is_open=False)
    batcher = make_batcher(model, queue_images=3)
    running = submit(batcher, images(1))
    assert model.started.acquire(timeout=20)
    waiting = submit(batcher, images(2, 3))
    with pytest.raises(BusyError) as caught:
        submit(batcher, images(4, 5))
    assert caught.value.status == 429
    assert int(caught.value.headers["Retry-After"]) >= 1
    fits = submit(batcher, images(6))
    for _ in range(3):
        model.may_run.release()
    assert first_pixels(running) + first_pixels(waiting) + first_pixels(fits) == [1, 2, 3, 6]
    model.may_run.release()
    assert first_pixels(submit(batcher, images(4, 5))) == [4, 5]
    batcher.close()


def test_a_request_larger_than_the_queue_is_taken_when_nothing_waits():
    batcher = make_batcher(GatedModel(), queue_images=3)
    assert len(first_pixels(submit(batcher, images(*range(10))))) == 10
    batcher.close()


def test_a_failed_run_fails_its_requests_and_no_other():
    batcher = make_batcher(GatedModel())
    with pytest.raises(ValueError, match="a bad image"):
        submit(batcher, images(255)).result(timeout=20)
    assert first_pixels(submit(batcher, images(7))) == [7]
    batcher.close()


def test_a_cancelled_request_is_not_run():
    model = GatedModel(is_open=False)
    batcher = make_batcher(model)
    running = submit(batcher, images(1))
    assert model.started.acquire(timeout=20)
    given_up, kept = submit(batcher, images(2)), submit(batcher, images(3))
    assert given_up.cancel()
    for _ in range(2):
        model.may_run.release()
    assert first_pixels(running) + first_pixels(kept) == [1, 3]
    assert model.sizes == [1, 1]
    batcher.close()


def test_closing_answers_what_is_queued_and_takes_no_more():
    model = GatedModel(is_open=False)
    batcher = make_batcher(model, batch_images=1)
    futures = [submit(batcher, images(value)) for value in range(5)]
    for _ in range(5):
        model.may_run.release()
    batcher.close()
    assert [first_pixels(future) for future in futures] == [[0], [1], [2], [3], [4]]
    with pytest.raises(RuntimeError, match="closed"):
        submit(batcher, images(1))


def test_many_threads_each_get_their_own_answers():
    batcher = make_batcher(GatedModel(), batch_delay=0.001, queue_images=1000)

    def ask(value: int) -> bool:
        with batcher.arriving() as arrival:
            future = arrival.submit(images(*[value % 251] * (1 + value % 3)))
        return first_pixels(future) == [value % 251] * (1 + value % 3)

    with ThreadPoolExecutor(16) as pool:
        futures = [pool.submit(ask, value) for value in range(400)]
        wait(futures, timeout=60)
    assert all(future.result() for future in futures)
    batcher.close()


def test_an_answer_that_is_not_finite_fails_its_own_request_only():
    def run(images: np.ndarray) -> np.ndarray:
        first_pixels = images[:, :1, 0, 0].astype(np.float32)
        return np.repeat(np.where(first_pixels == 1, np.nan, first_pixels), 10, axis=1)

    batcher = MicroBatcher(run, batch_images=4, batch_delay=30, queue_images=8)
    with batcher.arriving() as first, batcher.arriving() as second:
        broken, sound = first.submit(images(1)), second.submit(images(2))
    assert first_pixels(sound) == [2]
    with pytest.raises(NotFiniteError, match="not finite"):
        broken.result(timeout=20)
    batcher.close()
