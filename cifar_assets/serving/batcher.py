"""Micro-batching: requests join a bounded queue and one thread runs them through the model together."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Gauge, Histogram

from cifar_assets.serving.classifier import NotFiniteError
from cifar_assets.serving.faults import BusyError

_log = logging.getLogger(__name__)

Images = NDArray[np.uint8]
Logits = NDArray[np.float32]

BATCH_IMAGES = Histogram(
    "cifar10_batch_images", "Images in one run of the model.", buckets=(1, 2, 4, 8, 16, 32, 64, 128)
)
QUEUE_IMAGES = Gauge("cifar10_queue_images", "Images waiting for the inference thread.")
RUN_SECONDS = Histogram(
    "cifar10_run_seconds",
    "Duration of one run of the model.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5),
)


@dataclass(frozen=True)
class _Item:
    images: Images
    arrived: float
    future: "Future[Logits]" = field(default_factory=Future)


class Arrival:
    """A request on its way to the queue."""

    def __init__(self, batcher: "MicroBatcher"):
        self._batcher = batcher
        self.arrived = False

    def submit(self, images: Images) -> "Future[Logits]":
        """Queue images of shape (N, 3, 32, 32); the future gives logits of shape (N, 10).

        Raises BusyError when they do not fit into the queue.
        """
        self.arrived = True
        return self._batcher.submit_arrived(images)


class MicroBatcher:
    """Gathers what is waiting, up to `batch_images`, and runs it in one thread.

    A batch starts when it is full, when nobody else is on the way (see `arriving`), or when its first request has
    waited for `batch_delay` seconds, whichever comes first: a lone request waits for nothing.
    """

    def __init__(
        self,
        run: Callable[[Images], Logits],
        *,
        batch_images: int,
        batch_delay: float,
        queue_images: int,
    ):
        self._run = run
        self._batch_images = batch_images
        self._batch_delay = batch_delay
        self._queue_images = queue_images
        self._changed = threading.Condition()
        self._waiting: deque[_Item] = deque()
        self._num_waiting = 0
        self._num_arriving = 0
        self._seconds_per_image = 0.0
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)
        self._thread.start()

    @contextmanager
    def arriving(self) -> Iterator["Arrival"]:
        """Marks a request that is being read and will submit images soon; a batch may wait for it."""
        with self._changed:
            self._num_arriving += 1
        arrival = Arrival(self)
        try:
            yield arrival
        finally:
            if not arrival.arrived:
                with self._changed:
                    self._num_arriving -= 1
                    self._changed.notify()

    def submit_arrived(self, images: Images) -> "Future[Logits]":
        """Queue the images of a request that `arriving` marked, in one step with its coming: nobody waits for it."""
        with self._changed:
            self._num_arriving -= 1
            if self._closed:
                raise RuntimeError("The batcher is closed.")
            self._changed.notify()
            if self._waiting and self._num_waiting + len(images) > self._queue_images:
                raise BusyError(
                    "request",
                    f"room for {len(images)} images in the queue of {self._queue_images}",
                    f"{self._num_waiting} waiting",
                    retry_after=self._retry_after(),
                )
            item = _Item(images, time.monotonic())
            self._waiting.append(item)
            self._count_waiting(len(images))
            return item.future

    def retry_after(self) -> int:
        """Whole seconds until the queue as it is now will have been worked off, at least 1."""
        with self._changed:
            return self._retry_after()

    def close(self) -> None:
        """Run what is queued, then end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _retry_after(self) -> int:
        return min(60, max(1, math.ceil(self._num_waiting * self._seconds_per_image)))

    def _count_waiting(self, change: int) -> None:
        self._num_waiting += change
        QUEUE_IMAGES.set(self._num_waiting)

    def _work(self) -> None:
        while batch := self._next_batch():
            try:
                logits = self._run_batch([item.images for item in batch])
            except Exception as error:
                _log.exception("The model failed on a batch of %d requests", len(batch))
                for item in batch:
                    item.future.set_exception(error)
                continue
            start = 0
            for item in batch:
                own = logits[start : start + len(item.images)]
                start += len(item.images)
                if np.isfinite(own).all():
                    item.future.set_result(own)
                else:
                    item.future.set_exception(NotFiniteError("The model answered with values that are not finite."))

    def _next_batch(self) -> list[_Item]:
        """The next requests to run, none when closed and empty. Requests whose client gave up are left out."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return []
                deadline = self._waiting[0].arrived + self._batch_delay
                self._changed.wait_for(self._batch_is_due, timeout=max(0.0, deadline - time.monotonic()))
                batch = [item for item in self._take() if item.future.set_running_or_notify_cancel()]
                if batch:
                    return batch

    def _batch_is_due(self) -> bool:
        return self._closed or self._num_arriving == 0 or self._num_waiting >= self._batch_images

    def _take(self) -> Iterator[_Item]:
        num_taken = 0
        while self._waiting and (num_taken == 0 or num_taken + len(self._waiting[0].images) <= self._batch_images):
            item = self._waiting.popleft()
            num_taken += len(item.images)
            self._count_waiting(-len(item.images))
            yield item

    def _run_batch(self, parts: list[Images]) -> Logits:
        images = parts[0] if len(parts) == 1 else np.concatenate(parts)
        pieces = [
            self._run_once(images[start : start + self._batch_images])
            for start in range(0, len(images), self._batch_images)
        ]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _run_once(self, images: Images) -> Logits:
        started = time.monotonic()
        logits = self._run(images)
        seconds = time.monotonic() - started
        self._seconds_per_image = seconds / len(images)
        RUN_SECONDS.observe(seconds)
        BATCH_IMAGES.observe(len(images))
        return logits
