"""Which pictures are chosen, what a person's labels become, and whom the page's server answers."""

import base64
import http.client
import io
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from cifar_assets.assets.pictures_to_label import choose, land_told
from cifar_assets.contracts import CIFAR10, CLASSES, ImageSpec
from cifar_assets.dataset.formats.images import pixel_digest
from cifar_assets.labelling.batches import (
    Batch,
    Desk,
    Picture,
    labels_given,
    newest_batch,
    pictures_known,
    write_batch,
)
from cifar_assets.labelling.server import LabellingServer
from cifar_assets.traffic.records import Answered, BatchInfo, Feedback, Traffic, read_traffic
from cifar_assets.traffic.records import write_batch as write_records
from resources.errors import DataError
from resources.object_store import FolderStore

NAMES = ["a.png", "b.png", "c.png"]


def recorded(folder: Path, confidences: list[float], *, keep_pixels: bool = True) -> Traffic:
    """Pictures that differ, except for the last one, which is the first once more; places ("id", 0), ("id", 1), ..."""
    images = np.arange(len(confidences), dtype=np.uint8).repeat(3072).reshape(-1, 3, 32, 32)
    images[-1] = images[0]
    probabilities = np.stack([[each, *[(1 - each) / 9] * 9] for each in confidences])
    info = BatchInfo(model_digest="a" * 64, model_version="1", images=CIFAR10, responses={})
    write_records(FolderStore(folder), [Answered("id", 1e9, 0.1, images, probabilities)], info, keep_pixels=keep_pixels)
    now = datetime.now(UTC)
    (traffic,) = read_traffic(FolderStore(folder), now - timedelta(hours=1), now + timedelta(hours=1))
    return traffic


def test_drifted_pictures_are_chosen_first_and_then_the_least_certain(tmp_path: Path) -> None:
    traffic = recorded(tmp_path, [0.9, 0.5, 0.4, 0.3, 0.8, 0.2])
    chosen = choose(traffic, [("id", 4), ("id", 0), ("other", 1)], {("id", 3)}, set(), 4)
    assert [(each.index, each.reason) for each, _ in chosen] == [
        (4, "drifted"),
        (0, "drifted"),
        (2, "uncertain"),
        (1, "uncertain"),
    ]
    for picture, image in chosen:
        assert picture.file == f"{pixel_digest(image)}.png"
    picture = chosen[2][0]
    assert (picture.guess, picture.confidence) == ("airplane", pytest.approx(0.4))


def test_a_picture_is_chosen_once(tmp_path: Path) -> None:
    traffic = recorded(tmp_path, [0.9, 0.5, 0.2])
    asked = {picture.file for picture, _ in choose(traffic, [], set(), set(), 50)}
    assert len(asked) == 2
    assert choose(traffic, [("id", 1)], set(), asked, 50) == []


def test_without_pixels_there_is_nothing_to_label(tmp_path: Path) -> None:
    assert choose(recorded(tmp_path, [0.5, 0.6], keep_pixels=False), [], set(), set(), 50) == []


def store_batch(raw: FolderStore, name: str) -> None:
    pictures = [
        Picture(file=file, request_id=f"request-{file}", index=0, guess="cat", confidence=0.4, reason="uncertain")
        for file in NAMES
    ]
    batch = Batch(model_digest="a", classes=CLASSES, pictures=tuple(pictures))
    write_batch(raw, name, batch, [file.encode() for file in NAMES])


@pytest.fixture
def raw(tmp_path: Path) -> FolderStore:
    store = FolderStore(tmp_path)
    store_batch(store, "2026-01-01T000000")
    store_batch(store, "2026-01-02T000000")
    store.write("to-label/2026-01-03T000000/a.png", b"a batch that is still being written")
    return store


def landed(raw: FolderStore, key: str = "landing/labeled/2026-01-02T000000.parquet") -> list[dict[str, Any]]:
    return pq.read_table(io.BytesIO(raw.read(key))).to_pylist()


def test_labels_land_with_who_and_when(raw: FolderStore) -> None:
    started = datetime.now(UTC)
    desk = Desk(raw, None, "ada")
    for file, label in (("a.png", "dog"), ("b.png", "cat"), ("a.png", "truck"), ("c.png", "ship"), ("c.png", None)):
        desk.label(file, label)
    assert list(raw.list("landing/")) == []
    assert desk.save() == {"saved": 2, "key": "landing/labeled/2026-01-02T000000.parquet"}
    first, second = landed(raw)
    assert first["img"] == {"bytes": b"a.png", "path": None}
    assert (first["label"], second["label"]) == (CLASSES.index("truck"), CLASSES.index("cat"))
    assert (first["request_id"], first["labeled_by"]) == ("request-a.png", "ada")
    assert started <= first["labeled_at"] <= datetime.now(UTC)


def test_labeling_resumes_and_saving_again_replaces_what_landed(raw: FolderStore) -> None:
    desk = Desk(raw, None, "ada")
    desk.label("b.png", "cat")
    desk.label("a.png", "dog")
    desk.save()
    again = Desk(raw, None, "bob")
    assert list(again.state()["labels"].items()) == [("b.png", "cat"), ("a.png", "dog")]
    again.label("b.png", None)
    again.save()
    assert [row["labeled_by"] for row in landed(raw)] == ["ada"]


def test_the_newest_complete_batch_is_labeled_unless_one_is_named(raw: FolderStore, tmp_path: Path) -> None:
    assert Desk(raw, None, "ada").name == "2026-01-02T000000"
    assert Desk(raw, "2026-01-01T000000", "ada").name == "2026-01-01T000000"
    assert set(NAMES) <= pictures_known(raw)
    with pytest.raises(DataError, match="materialize pictures_to_label first"):
        newest_batch(FolderStore(tmp_path / "empty"))
    with pytest.raises(DataError, match="2026-01-03T000000/ is not a complete batch"):
        Desk(raw, "2026-01-03T000000", "ada")


@pytest.mark.parametrize(("file", "label"), [("../x", "cat"), ("manifest.json", "cat"), ("a.png", "unicorn")])
def test_only_pictures_of_the_batch_and_its_classes_can_be_named(raw: FolderStore, file: str, label: str) -> None:
    desk = Desk(raw, None, "ada")
    with pytest.raises(DataError, match="reload the page"):
        desk.label(file, label)
    with pytest.raises(DataError, match="has no labels"):
        desk.save()


def test_what_is_left_of_a_removed_batch_gives_no_labels(raw: FolderStore) -> None:
    Desk(raw, None, "ada").label("a.png", "dog")
    assert labels_given(raw) == {("request-a.png", 0): "dog"}
    raw.delete("to-label/2026-01-02T000000/manifest.json")
    assert labels_given(raw) == {}


def told(traffic: Traffic, *labels: tuple[int, str]) -> Traffic:
    """The traffic with feedback about pictures, one second after the other."""
    feedback = tuple(
        Feedback(request_id="id", index=index, label=label, time=1e9 + second)
        for second, (index, label) in enumerate(labels)
    )
    return replace(traffic, info=traffic.info.model_copy(update={"feedback": feedback}))


def feedback_landed(raw: FolderStore) -> list[tuple[str, float]]:
    """Class and time of modification of each picture."""
    return [
        (CLASSES[row["label"]], info.last_modified.timestamp())
        for info in raw.list("landing/feedback/")
        for row in landed(raw, info.key)
    ]


def test_the_last_label_of_the_same_pixels_lands_once(tmp_path: Path) -> None:
    """The first and the last of the recorded pictures are the same."""
    raw, traffic = FolderStore(tmp_path / "raw"), recorded(tmp_path / "traffic", [0.9, 0.5, 0.2])
    assert land_told(raw, [told(traffic, (0, "cat"), (1, "ship"), (2, "dog"))]) == {("id", 0), ("id", 1), ("id", 2)}
    assert sorted(label for label, _ in feedback_landed(raw)) == ["dog", "ship"]
    for info in raw.list("landing/feedback/"):
        os.utime(str(raw.local_path(info.key)), (0, 0))
    land_told(raw, [told(traffic, (0, "truck"), (1, "cat"), (1, "ship"))])
    assert [(label, time == 0) for label, time in sorted(feedback_landed(raw))] == [("ship", True), ("truck", False)]
    assert choose(traffic, [], set(), pictures_known(raw), 50) == []


def test_a_label_in_a_batch_replaces_feedback(tmp_path: Path) -> None:
    raw, traffic = FolderStore(tmp_path / "raw"), recorded(tmp_path / "traffic", [0.9, 0.5, 0.2])
    chosen = choose(traffic, [], set(), set(), 50)
    batch = Batch(model_digest="a", classes=CLASSES, pictures=tuple(picture for picture, _ in chosen))
    write_batch(raw, "2026-01-01T000000", batch, [b"png"] * len(chosen))
    land_told(raw, [told(traffic, (0, "cat"), (1, "ship"))])
    desk = Desk(raw, None, "ada")
    (file,) = {picture.file for picture, _ in chosen if picture.index == 1}
    desk.label(file, "dog")
    desk.save()
    assert [label for label, _ in feedback_landed(raw)] == ["cat"]
    assert land_told(raw, [told(traffic, (0, "cat"), (1, "ship"))]) == {("id", 0)}
    assert [label for label, _ in feedback_landed(raw)] == ["cat"]


def test_feedback_about_other_classes_is_left_out(tmp_path: Path) -> None:
    raw, traffic = FolderStore(tmp_path / "raw"), recorded(tmp_path / "traffic", [0.9, 0.5, 0.2])
    other = traffic.info.model_copy(update={"images": ImageSpec(classes=("cat", "lion"))})
    before = told(replace(traffic, info=other), (0, "cat"), (1, "lion"))
    now = replace(told(traffic, (1, "unicorn")), table=traffic.table.slice(1))
    assert land_told(raw, [before, now]) == set()
    assert feedback_landed(raw) == []
    assert land_told(raw, []) == set()


class Page:
    """Sends what the page sends, or something else."""

    def __init__(self, server: LabellingServer):
        self.host = server.host
        self.sent = {"Origin": f"http://{server.host}"}

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection(self.host, timeout=300)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, {**(self.sent if method == "POST" else {}), **named})
        response = connection.getresponse()
        assert response.headers["Cache-Control"] == "no-store"
        return response.status, response.read()


@pytest.fixture
def page(raw: FolderStore) -> Iterator[Page]:
    with LabellingServer(Desk(raw, None, "ada"), 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield Page(server)
        server.shutdown()
        thread.join()


def test_the_page_gets_the_batch_and_labels_it(page: Page, raw: FolderStore) -> None:
    assert b"Batch 2026-01-02T000000" in page.ask("GET", "/")[1]
    pictures = json.loads(page.ask("GET", "/batch")[1])["pictures"]
    assert [base64.b64decode(picture["png"]) for picture in pictures] == [b"a.png", b"b.png", b"c.png"]
    assert page.ask("POST", "/label", json.dumps({"file": "b.png", "label": "deer"}).encode())[0] == 200
    assert page.ask("POST", "/save", b"{}")[0] == 200
    assert [row["label"] for row in landed(raw)] == [CLASSES.index("deer")]


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/manifest.json", None, 404),
        ("POST", "/batch", b"{}", 404),
        ("POST", "/label", b"{", 400),
        ("POST", "/label", b"[]", 400),
        ("POST", "/label", b'{"file": "b.png"}', 400),
        ("POST", "/label", b'{"file": [1], "label": "cat"}', 400),
        ("POST", "/label", b"1" * 20_000, 400),
        ("POST", "/save", b"{}", 400),
        ("PUT", "/label", b"{}", 501),
    ],
)
def test_invalid_requests_are_rejected(page: Page, method: str, path: str, body: bytes | None, status: int) -> None:
    connection = http.client.HTTPConnection(page.host, timeout=300)
    connection.request(method, path, body, page.sent)
    assert connection.getresponse().status == status


def test_other_sites_are_not_answered(page: Page, raw: FolderStore) -> None:
    """Neither a form or script of theirs, nor one under a name of theirs that resolves to 127.0.0.1."""
    body = json.dumps({"file": "b.png", "label": "deer"}).encode()
    for headers in ({"Host": "evil.example"}, {"Origin": "null"}, {"Origin": "http://evil.example"}):
        assert page.ask("POST", "/label", body, **headers)[0] == 403
    assert page.ask("GET", "/batch", Host="evil.example")[0] == 403
    assert not raw.exists("to-label/2026-01-02T000000/labels.json")
