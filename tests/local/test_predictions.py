"""Batch prediction in a process that is killed, and from a real S3 server."""

import os
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest

from cifar_assets.predictions.run import Predictions, predict
from resources.digests import sha256_bytes
from resources.object_store import FolderStore
from tests.fixtures.s3 import S3Server
from tests.fixtures.workspace import wait_until
from tests.unit.predictions.test_predictions import png, rows_of, stored
from tests.unit.serving.tiny_model import store_tiny_model

LAST_OF_A_PART = next(
    name for number in count() if int(sha256_bytes((name := f"a{number:06d}.png").encode())[:8], 16) % 2048 == 0
)
"""A name after which a part ends."""
NAMES = ["a.png", LAST_OF_A_PART, "b.png", "c.png"]


class World:
    """A folder with two parts of two pictures each."""

    def __init__(self, folder: Path):
        self.folder, self.photos = folder, folder / "photos"
        self.store = FolderStore(folder / "store")
        _, self.digest = store_tiny_model(self.store.at("models"))
        self.photos.mkdir()
        for number, name in enumerate(NAMES):
            (self.photos / name).write_bytes(png(number))

    def predict(self, source: str | None = None) -> Predictions:
        stores = self.store.at("models"), self.store.at("processed-data")
        return predict(source or str(self.photos), *stores, self.digest, "float32")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_killed_process_loses_only_the_part_at_hand(world: World) -> None:
    (world.photos / "b.png").unlink()
    os.mkfifo(world.photos / "b.png")  # whoever reads it waits
    command = [sys.executable, "-m", "cifar_assets.predictions", "--store", str(world.store.root)]
    command += ["--model", world.digest, str(world.photos)]
    processed = world.store.at("processed-data")

    def notes() -> list[str]:
        return [info.key for info in processed.list("predictions/") if info.key.endswith(".json")]

    with (world.folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: bool(notes()) or process.poll() is not None, "the first part")
        assert process.poll() is None, (world.folder / "log").read_text()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (note,) = notes()
    target = processed.at(note.rpartition("/")[0])
    before = stored(target)
    assert len(before) == 1
    (world.photos / "b.png").unlink()
    (world.photos / "b.png").write_bytes(png(2))

    second = world.predict()
    assert second.num_predicted == 2
    files = stored(target)
    assert files.items() > before.items()
    for key in files:
        target.delete(key)
    third = world.predict()  # without interruption
    assert third.num_predicted == 4
    assert stored(target) == files
    assert third.manifest == second.manifest


def test_a_prefix_of_a_bucket(world: World, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    bucket = "prediction-source"
    s3_server.store().ensure_buckets([bucket])
    s3_server.store(bucket).write("photos2/other.png", png(8))
    for name in NAMES:
        s3_server.store(bucket).write(f"photos/{name}", (world.photos / name).read_bytes())
    found = world.predict(f"s3://{bucket}/photos")
    assert rows_of(found) == rows_of(world.predict())
    assert found.unread == {}
    assert world.predict(f"s3://{bucket}/photos/").num_predicted == 0
    s3_server.store(bucket).write("photos/c.png", png(9))
    assert world.predict(f"s3://{bucket}/photos").num_predicted == 1
