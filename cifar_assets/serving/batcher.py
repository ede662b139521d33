"""Micro-batching: requests queue up while the model runs, and the next run takes its share of the queue.

Everything except the run itself happens on the event loop, so a batch costs one wake-up on each side, regardless of the
number of requests in it, and needs no lock. There are as many runs at a time as CPUs, each in one thread: threads that
compute one run together wait for each other in every layer. Only a run that has the model to itself uses all CPUs.
"""

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue

import numpy as np

from cifar_assets.serving.answers import BusyError, GoneError, Images, Logits, RequestError
from cifar_assets.serving.metrics import BATCH_IMAGES, QUEUE_IMAGES, RUN_SECONDS

_SHORT_SECONDS = 0.002
"""A run that is expected to be shorter happens on the event loop: waking up a thread would cost as much."""


@dataclass(eq=False)
class Ticket:
    """A request in the queue. `done` is called once, with its logits or with an error."""

    images: Images
    done: Callable[[Logits | Exception], None]
    is_wanted: Callable[[], bool]
    num_taken: int = 0
    logits: list[Logits] = field(default_factory=list)

    @property
    def num_left(self) -> int:
        return len(self.images) - self.num_taken

    def add(self, logits: Logits) -> None:
        """Add the logits of the next images, in order; finish when they are complete."""
        self.logits.append(logits)
        if sum(map(len, self.logits)) == len(self.images):
            found = np.concatenate(self.logits) if len(self.logits) > 1 else logits
            finite = np.isfinite(found).all()
            self.done(found if finite else RequestError("model", "finite values", "not finite ones", status=500))


_Batch = list[tuple[Ticket, Images]]
"""Requests, each with its images in the batch."""
Run = Callable[[Images, bool], Logits]
"""Logits of images. The second argument says whether this is the only run, which may use all CPUs."""


class MicroBatcher:
    """Runs images through the model in `num_threads` threads. Create and use it on the event loop."""

    def __init__(self, run: Run, *, batch_images: int, queue_images: int, num_threads: int = 1):
        self._run = run
        self._batch_images = batch_images
        self._queue_images = queue_images
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Ticket] = deque()
        self._num_waiting = 0
        self._seconds_per_image = 0.01
        self._is_scheduled = False
        self._num_running = self._num_images_running = 0
        self._batches: SimpleQueue[tuple[_Batch, bool] | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name="inference", daemon=True) for _ in range(num_threads)]
        for thread in self._threads:
            thread.start()
        QUEUE_IMAGES.set_function(lambda: self._num_waiting)

    def check_room(self, num_images: int) -> None:
        """BusyError if the images do not fit into the queue.

        A quarter of it is reserved for requests that fit into one batch, so that large ones cannot fill it.
        """
        room = self._queue_images if num_images <= self._batch_images else self._queue_images * 3 // 4
        if self._num_waiting and self._num_waiting + num_images > room:
            limit = f"room for {num_images} images in the queue of {self._queue_images}"
            raise BusyError(limit, f"{self._num_waiting} waiting")

    def submit(
        self, images: Images, done: Callable[[Logits | Exception], None], is_wanted: Callable[[], bool] = lambda: True
    ) -> None:
        """Queue images (N, 3, size, size), left out if not wanted when their turn comes. BusyError for no room."""
        self.check_room(len(images))
        self._waiting.append(Ticket(images, done, is_wanted))
        self._num_waiting += len(images)
        if not self._is_scheduled and self._num_running < len(self._threads):
            self._is_scheduled = True
            self._loop.call_soon(self._start)  # after all requests that have arrived by now

    def close(self) -> None:
        """Stop the threads after their current batches."""
        for _ in self._threads:
            self._batches.put(None)
        for thread in self._threads:
            thread.join()

    def _start(self) -> None:
        """Give each idle thread its share of the queue."""
        self._is_scheduled = False
        while self._waiting and self._num_running < len(self._threads):
            is_short = not self._num_running and self._num_waiting * self._seconds_per_image <= _SHORT_SECONDS
            share = math.ceil((self._num_waiting + self._num_images_running) / len(self._threads))
            batch = self._take(self._num_waiting if is_short else share)
            if not batch:
                return
            is_alone = not self._num_running and not self._waiting
            self._num_running += 1
            self._num_images_running += sum(len(images) for _, images in batch)
            if is_short:
                self._loop.call_soon(self._finish, batch, *self._run_batch(batch, is_alone))
                return
            self._batches.put((batch, is_alone))

    def _take(self, num_images: int) -> _Batch:
        """The next batch. A request that does not fit queues again for the rest of it when this part is done."""
        batch: _Batch = []
        room = min(num_images, self._batch_images)
        while self._waiting and room:
            ticket = self._waiting.popleft()
            if not ticket.is_wanted():
                self._num_waiting -= ticket.num_left
                ticket.done(GoneError())
                continue
            images = ticket.images[ticket.num_taken : ticket.num_taken + room]
            batch.append((ticket, images))
            room -= len(images)
            self._num_waiting -= len(images)
            ticket.num_taken += len(images)
        return batch

    def _finish(self, batch: _Batch, outcome: Logits | Exception, seconds: float) -> None:
        num_images = sum(len(images) for _, images in batch)
        self._seconds_per_image = seconds / num_images
        self._num_running -= 1
        self._num_images_running -= num_images
        ticket = batch[-1][0]  # the only one that may not have fit
        if ticket.num_left and isinstance(outcome, Exception):
            self._num_waiting -= ticket.num_left
        elif ticket.num_left:
            self._waiting.append(ticket)
        self._start()
        RUN_SECONDS.observe(seconds)
        BATCH_IMAGES.observe(num_images)
        start = 0
        for ticket, images in batch:
            if isinstance(outcome, Exception):
                ticket.done(outcome)
            else:
                ticket.add(outcome[start : start + len(images)])
                start += len(images)

    def _work(self) -> None:
        while (work := self._batches.get()) is not None:
            outcome = self._run_batch(*work)
            with contextlib.suppress(RuntimeError):  # the loop was closed by a second Ctrl-C
                self._loop.call_soon_threadsafe(self._finish, work[0], *outcome)

    def _run_batch(self, batch: _Batch, is_alone: bool) -> tuple[Logits | Exception, float]:
        """The logits of the batch or an error, and the duration in seconds."""
        started = time.monotonic()
        try:
            images = batch[0][1] if len(batch) == 1 else np.concatenate([images for _, images in batch])
            outcome: Logits | Exception = self._run(images, is_alone)
        except Exception as error:
            outcome = error
        return outcome, time.monotonic() - started
