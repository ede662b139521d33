"""What is recorded of the answers, what is dropped, and when it is written."""

import threading
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cifar_assets.contracts import CIFAR10
from cifar_assets.serving import recorder as module
from cifar_assets.serving.answers import ServedModel
from cifar_assets.serving.classifier import softmax
from cifar_assets.serving.http import Request
from cifar_assets.serving.metrics import RECORDED_IMAGES
from cifar_assets.serving.recorder import Recorder, open_recorder
from cifar_assets.serving.settings import ServerSettings
from cifar_assets.traffic.records import Traffic, read_traffic
from resources.errors import StoreError
from resources.object_store import FolderStore

MODEL = ServedModel("cifar10", "1", "a" * 64, "d" * 64, CIFAR10)
LOGITS = np.random.default_rng(0).normal(size=(64, 10)).astype(np.float32)


class GatedStore(FolderStore):
    """A store that writes when it is let, or fails."""

    is_away = False

    def __init__(self, root: Path):
        super().__init__(root)
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Event()

    def write(self, key: str, data: bytes) -> None:
        self.started.set()
        assert self.gate.wait(300)
        if self.is_away:
            raise StoreError("no response", transient=True)
        super().write(key, data)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[GatedStore]:
    store = GatedStore(tmp_path)
    yield store
    store.gate.set()


def recorder(store: FolderStore, **settings: Any) -> Recorder:
    defaults = {"record_fraction": 1, "record_interval": 3600, "record_per_hour": 10_000}
    required = {"model_uri": "file:///m/", "model_digest": MODEL.digest}
    return Recorder(store, MODEL, ServerSettings.model_validate({**required, **defaults, **settings}))


def request(request_id: str = "id", cache_control: bytes = b"") -> Request:
    headers = {b"cache-control": cache_control} if cache_control else {}
    return Request(lambda _: None, "POST", "/", headers, b"", keep_alive=True, id=request_id)


def images(number: int) -> np.ndarray:
    return np.full((number, 3, 32, 32), number, np.uint8)


def send(recorder: Recorder, number: int = 1, **sent: Any) -> None:
    recorder.count(request(**sent), 200)
    recorder.record(request(**sent), images(number), LOGITS[:number], 0.5)


def recorded(store: FolderStore) -> list[Traffic]:
    now = datetime.now(UTC)
    return read_traffic(store, now - timedelta(hours=1), now + timedelta(hours=1))


def outcomes() -> Counter[str]:
    (metric,) = RECORDED_IMAGES.collect()
    return Counter({each.labels["outcome"]: int(each.value) for each in metric.samples if each.name.endswith("_total")})


@pytest.fixture
def before() -> Counter[str]:
    return outcomes()


def test_answers_are_written_at_the_end(store: GatedStore, before: Counter[str]) -> None:
    own = recorder(store)
    send(own, 1, request_id="one")
    send(own, 2, request_id="two")
    own.count(request(), 400)
    own.close(300)
    (traffic,) = recorded(store)
    assert traffic.table["request_id"].to_pylist() == ["one", "two", "two"]
    assert traffic.info.model_dump() == {
        "model_digest": MODEL.digest,
        "model_version": "1",
        "images": CIFAR10.model_dump(),
        "responses": {"200": 2, "400": 1},
        "feedback": (),
    }
    np.testing.assert_allclose(traffic.probabilities, softmax(LOGITS[[0, 0, 1]]), rtol=1e-5)
    np.testing.assert_array_equal(traffic.image(2), images(2)[0])
    assert outcomes() - before == {"written": 3}


def test_a_full_batch_and_the_interval_write_while_the_server_runs(store: GatedStore) -> None:
    for settings, number in (({}, module._BATCH_IMAGES // 64), ({"record_interval": 0.01}, 1)):
        store.started.clear()
        own = recorder(store, **settings)
        for _ in range(number):
            send(own, 64)
        assert store.started.wait(300)
        own.close(300)


def test_an_idle_server_writes_nothing(store: GatedStore) -> None:
    recorder(store).close(300)
    assert list(store.list()) == []


def test_a_request_that_must_not_be_stored_leaves_no_trace(store: GatedStore) -> None:
    own = recorder(store)
    send(own, cache_control=b"max-age=0, No-Store")
    own.close(300)
    assert list(store.list()) == []


@pytest.mark.parametrize(("fraction", "low", "high"), [(0, 0, 0), (0.25, 150, 350), (1, 1000, 1000)])
def test_the_sample_has_the_requested_size(store: GatedStore, fraction: float, low: int, high: int) -> None:
    module.random.seed(1)
    own = recorder(store, record_fraction=fraction)
    for _ in range(1000):
        own.record(request(), images(1), LOGITS[:1], 0.1)
        own._num_waiting = 0  # so that the queue is never full
    own.count(request(), 200)
    own.close(300)
    assert low <= sum(len(each) for each in recorded(store)) <= high


def test_the_hourly_limit_starts_again_after_an_hour(
    store: GatedStore, before: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = recorder(store, record_per_hour=3)
    for number in (2, 2, 1, 1):
        send(own, number)
    own._hour_started -= 3600
    send(own, 3)
    own.close(300)
    (traffic,) = recorded(store)
    assert len(traffic) == 6
    assert traffic.info.responses == {"200": 5}
    assert outcomes() - before == {"written": 6, "over_limit": 3}


def test_a_full_queue_drops_without_waiting_for_the_store(store: GatedStore, before: Counter[str]) -> None:
    store.gate.clear()
    own = recorder(store)
    for _ in range(module._BATCH_IMAGES // 64):
        send(own, 64)
    assert store.started.wait(300)  # the writer has these, and hangs
    for _ in range(module._QUEUE_IMAGES // 64 + 2):
        send(own, 64)
    assert outcomes() - before == {"queue_full": 128}
    store.gate.set()
    own.close(300)
    assert sum(len(each) for each in recorded(store)) == module._BATCH_IMAGES + module._QUEUE_IMAGES


def test_what_a_failing_store_refuses_is_counted_and_logged_once(
    store: GatedStore, before: Counter[str], caplog: pytest.LogCaptureFixture
) -> None:
    store.is_away = True
    own = recorder(store)
    for _ in range(2):
        send(own)
        own._write()
    assert outcomes() - before == {"store_failed": 2}
    store.is_away = False
    send(own, request_id="later")
    own.close(300)
    (traffic,) = recorded(store)
    assert traffic.table["request_id"].to_pylist() == ["later"]
    assert traffic.info.responses == {"200": 3}
    assert [record.message for record in caplog.records] == [
        "Answers are not recorded until the object store works again: no response"
    ]


def test_closing_does_not_wait_for_a_store_that_hangs(store: GatedStore, caplog: pytest.LogCaptureFixture) -> None:
    store.gate.clear()
    own = recorder(store)
    send(own)
    own.close(0.01)
    assert "were not written" in caplog.text


def test_recording_is_off_by_default() -> None:
    settings = ServerSettings.model_validate({"model_uri": "file:///m/", "model_digest": "a"})
    assert open_recorder(settings, MODEL) is None
