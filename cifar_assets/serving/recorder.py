"""Records a sample of the answers in the object store, without delaying them. See docs/monitoring.md."""

import logging
import random
import threading
import time
from collections import Counter
from dataclasses import replace

from cifar_assets.serving.answers import Images, Logits, ServedModel
from cifar_assets.serving.classifier import softmax
from cifar_assets.serving.http import Request
from cifar_assets.serving.metrics import RECORDED_IMAGES
from cifar_assets.serving.settings import ServerSettings
from cifar_assets.traffic.records import Answered, BatchInfo, Feedback, write_batch
from resources.object_store import ObjectStore, open_store

_log = logging.getLogger(__name__)
_BATCH_IMAGES = 256
_QUEUE_IMAGES = 1024
_QUEUE_FEEDBACK = 1024
_HOUR_SECONDS = 3600.0


class Recorder:
    """Takes answers on the event loop and writes them in a thread. What does not fit into its queue is dropped.

    A request with `Cache-Control: no-store` is neither recorded nor counted.
    """

    def __init__(self, store: ObjectStore, model: ServedModel, settings: ServerSettings):
        import pyarrow.parquet  # noqa: F401  (loaded before the server listens: it would delay requests)

        self._store = store
        self._model = model
        self._settings = settings
        self._lock = threading.Lock()
        self._waiting: list[Answered] = []
        """With logits in place of the probabilities."""
        self._num_waiting = 0
        self._responses: Counter[str] = Counter()
        self._feedback: list[Feedback] = []
        self._hour_started = time.monotonic()
        self._num_this_hour = 0
        self._is_away = False
        """Whether the last write failed."""
        self._is_closing = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self._thread.start()

    def count(self, request: Request, status: int) -> None:
        """Count a response, unless its client has gone."""
        if request.is_wanted and _may_be_stored(request):
            with self._lock:
                self._responses[str(status)] += 1

    def record(self, request: Request, images: Images, logits: Logits, seconds: float) -> None:
        """Queue an answer if it is in the sample. `seconds` is how long it took."""
        if random.random() >= self._settings.record_fraction or not _may_be_stored(request):
            return
        num_images = len(images)
        if time.monotonic() - self._hour_started >= _HOUR_SECONDS:
            self._hour_started, self._num_this_hour = time.monotonic(), 0
        if self._num_this_hour + num_images > self._settings.record_per_hour:
            _count("over_limit", num_images)
            return
        answered = Answered(request.id, time.time(), seconds, images, logits)
        with self._lock:
            has_room = self._num_waiting + num_images <= _QUEUE_IMAGES
            if has_room:
                self._waiting.append(answered)
                self._num_waiting += num_images
        if not has_room:
            _count("queue_full", num_images)
            return
        self._num_this_hour += num_images
        if self._num_waiting >= _BATCH_IMAGES:
            self._wake.set()

    def add_feedback(self, feedback: Feedback) -> bool:
        """Queue it; False if the queue is full."""
        with self._lock:
            has_room = len(self._feedback) < _QUEUE_FEEDBACK
            if has_room:
                self._feedback.append(feedback)
        return has_room

    def close(self, seconds: float) -> None:
        """Write what is queued, if that takes no longer than this."""
        self._is_closing = True
        self._wake.set()
        self._thread.join(seconds)
        if self._thread.is_alive():
            _log.warning("The last records were not written to %s within %.0f s.", self._store.uri(), seconds)

    def _work(self) -> None:
        is_last = False
        while not is_last:
            self._wake.wait(self._settings.record_interval)
            self._wake.clear()
            is_last = self._is_closing
            self._write()

    def _write(self) -> None:
        with self._lock:
            waiting, self._waiting, self._num_waiting = self._waiting, [], 0
            responses, self._responses = self._responses, Counter()
            feedback, self._feedback = self._feedback, []
        if not waiting and not responses and not feedback:
            return
        num_images = sum(len(each.images) for each in waiting)
        model = self._model
        info = BatchInfo(
            model_digest=model.digest,
            model_version=model.version,
            images=model.images.spec,
            responses=responses,
            feedback=tuple(feedback),
        )
        answers = [replace(each, probabilities=softmax(each.probabilities)) for each in waiting]
        try:
            write_batch(self._store, answers, info, keep_pixels=self._settings.record_pixels)
        except Exception as error:  # whatever it is, the next batch may succeed
            with self._lock:
                self._responses += responses
                self._feedback = feedback + self._feedback
            _count("store_failed", num_images)
            if not self._is_away:
                _log.warning("Answers are not recorded until the object store works again: %s", error)
            self._is_away = True
        else:
            _count("written", num_images)
            self._is_away = False


def open_recorder(settings: ServerSettings, model: ServedModel) -> Recorder | None:
    """The recorder; None if recording is off. ConfigError for an invalid address."""
    if not settings.record_uri or not settings.record_fraction:
        return None
    _log.info("Recording %g of the requests to %s", settings.record_fraction, settings.record_uri)
    return Recorder(open_store(settings.record_uri), model, settings)


def _may_be_stored(request: Request) -> bool:
    return b"no-store" not in request.headers.get(b"cache-control", b"").lower()


def _count(outcome: str, num_images: int) -> None:
    RECORDED_IMAGES.labels(outcome).inc(num_images)
