"""Labels that programs send: what is accepted, and that it is recorded."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cifar_assets.serving import recorder as module
from cifar_assets.serving.feedback import take_feedback
from cifar_assets.serving.http import Request
from cifar_assets.traffic.records import read_traffic
from resources.errors import StoreError
from resources.object_store import FolderStore
from tests.unit.serving.test_recorder import MODEL, recorder


def tell(own: module.Recorder, body: Any) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = take_feedback(own, MODEL, Request(lambda _: None, "POST", "/v1/feedback", {}, data, keep_alive=True))
    return response.status, json.loads(response.body)


def test_feedback_is_recorded_with_the_time(tmp_path: Path) -> None:
    own = recorder(FolderStore(tmp_path))
    assert tell(own, {"request_id": "one", "label": "cat"}) == (202, {"request_id": "one", "index": 0, "label": "cat"})
    assert tell(own, {"request_id": "two", "index": 3, "label": "dog"})[0] == 202
    own.close(300)
    now = datetime.now(UTC)
    (traffic,) = read_traffic(FolderStore(tmp_path), now - timedelta(hours=1), now + timedelta(hours=1))
    assert [(each.place, each.label) for each in traffic.info.feedback] == [(("one", 0), "cat"), (("two", 3), "dog")]
    assert traffic.info.feedback[0].time == pytest.approx(now.timestamp(), abs=600)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "body: expected a JSON object"),
        ({"label": "cat"}, "request_id: expected a value"),
        ({"request_id": "", "label": "cat"}, "request_id: expected at least 1 character"),
        ({"request_id": "x" * 129, "label": "cat"}, "request_id: expected at most 128 characters"),
        ({"request_id": "x", "label": "unicorn"}, "label: expected one of airplane, "),
        ({"request_id": "x", "label": "cat", "index": -1}, "index: expected"),
        ({"request_id": "x", "label": "cat", "other": 1}, "other: "),
    ],
)
def test_invalid_feedback_is_rejected(tmp_path: Path, body: Any, words: str) -> None:
    own = recorder(FolderStore(tmp_path))
    status, answer = tell(own, body)
    assert status == 400
    assert words in answer["error"]
    own.close(300)
    assert list(FolderStore(tmp_path).list()) == []


def test_a_full_queue_is_an_answer_and_nothing_is_lost_while_the_store_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_QUEUE_FEEDBACK", 2)
    store = FolderStore(tmp_path)

    def fail(key: str, data: bytes) -> None:
        raise StoreError("no response", transient=True)

    own = recorder(store)
    with monkeypatch.context() as patch:
        patch.setattr(FolderStore, "write", fail)
        assert [tell(own, {"request_id": name, "label": "cat"})[0] for name in "abc"] == [202, 202, 429]
        own._write()
    own.close(300)
    now = datetime.now(UTC)
    (traffic,) = read_traffic(store, now - timedelta(hours=1), now + timedelta(hours=1))
    assert [each.request_id for each in traffic.info.feedback] == ["a", "b"]
