"""Which pictures are classified, in which parts, and what a second run does not repeat."""

import io
import os
from pathlib import Path
from threading import Lock
from typing import Any

import dagster as dg
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cifar_assets.assets import inference_service as service_asset
from cifar_assets.assets.common import AccuracyGate
from cifar_assets.contracts import CLASSES
from cifar_assets.dataset.formats.images import SOURCE_LIMITS, prepare_image
from cifar_assets.predictions import parts as parts_module
from cifar_assets.predictions import run as run_module
from cifar_assets.predictions.__main__ import main
from cifar_assets.predictions.parts import COLUMNS, slices
from cifar_assets.predictions.run import Predictions, predict
from resources.errors import ConfigError, ObjectNotFoundError, StoreError
from resources.object_store import FolderStore, ObjectStore
from resources.object_store.resource import LocalObjectStore
from tests.fixtures.cifar10 import INFERENCE_SERVICE, PREDICTIONS, predictions
from tests.unit.serving.tiny_model import store_tiny_model, tiny_logits, tiny_onnx

NUM_PICTURES = 90


def png(number: int, side: int = 32) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


class World:
    """A folder of pictures, and a store with a model."""

    def __init__(self, folder: Path):
        self.photos = folder / "My photos"
        self.root = FolderStore(folder / "store")
        self.models, self.processed = self.root.at("models"), self.root.at("processed-data")
        _, self.digest = store_tiny_model(self.models)
        for number in range(NUM_PICTURES):
            self.write(f"{number % 3}/{number:03d}.png", png(number))

    def write(self, name: str, data: bytes) -> None:
        path = self.photos / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def predict(self) -> Predictions:
        return predict(str(self.photos), self.models, self.processed, self.digest, "float32")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(parts_module, "_MEAN_ROWS", 8)
    monkeypatch.setattr(parts_module, "_MAX_ROWS", 64)
    return World(tmp_path)


def stored(store: ObjectStore) -> dict[str, bytes]:
    return {info.key: store.read(info.key) for info in store.list() if info.key.endswith(".parquet")}


def rows_of(found: Predictions) -> list[dict[str, object]]:
    assert set(stored(found.target)) == set(found.manifest.files)
    tables = [pq.read_table(io.BytesIO(found.target.read_verified(*each))) for each in found.manifest.files.items()]
    return [row for table in tables for row in table.to_pylist()]


def test_each_picture_has_the_models_answer(world: World) -> None:
    found = world.predict()
    rows = rows_of(found)
    assert len(found.manifest.files) > 5
    assert [row["path"] for row in rows] == sorted(f"{number % 3}/{number:03d}.png" for number in range(NUM_PICTURES))
    assert {tuple(row) for row in rows} == {tuple(COLUMNS)}
    for row in rows:
        logits = tiny_logits(prepare_image((world.photos / str(row["path"])).read_bytes(), 32)[None])[0]
        expected = np.exp(logits - logits.max())
        np.testing.assert_allclose(np.array(row["probabilities"]), expected / expected.sum(), rtol=1e-4, atol=1e-6)
        assert row["class"] == CLASSES[int(logits.argmax())]
        assert row["confidence"] == max(row["probabilities"])  # pyright: ignore[reportArgumentType]
        assert row["model_digest"] == world.digest
    assert sum(found.counts.values()) == found.num_predicted == found.manifest.rows == NUM_PICTURES
    assert found.uncertain[0][0] == min(row["confidence"] for row in rows)  # pyright: ignore[reportArgumentType]
    assert found.target.uri().endswith(f"/{world.digest}/float32/")
    assert "/predictions/my-photos-" in found.target.uri()
    assert found.sheet().startswith(b"\x89PNG")


def test_a_second_run_repeats_nothing(world: World) -> None:
    first = world.predict()
    files = stored(first.target)
    second = world.predict()
    assert (second.num_predicted, second.manifest.digest) == (0, first.manifest.digest)
    assert (second.counts, second.uncertain) == (first.counts, first.uncertain)
    assert stored(second.target) == files


def test_only_new_and_changed_pictures_are_classified(world: World) -> None:
    first = world.predict()
    world.write("1/000a.png", png(1000))
    world.write("2/050.png", png(1001))
    os.utime(world.photos / "0/030.png", (1, 1))  # touched, with the same content
    (world.photos / "0/066.png").unlink()
    second = world.predict()
    assert second.num_predicted == 2
    assert second.manifest.digest != first.manifest.digest
    assert len(rows_of(second)) == NUM_PICTURES
    untouched = first.manifest.files.items() & second.manifest.files.items()
    assert len(untouched) >= len(first.manifest.files) - 4


def test_a_damaged_or_removed_part_is_made_again(world: World) -> None:
    first = world.predict()
    removed, damaged = list(first.manifest.files)[:2]
    first.target.delete(removed)
    first.target.write(damaged, b"short")
    assert world.predict().manifest == first.manifest
    assert {removed, damaged} <= set(stored(first.target))


def test_an_interrupted_run_continues(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that fails in the middle; tests/local kills the process."""
    read = FolderStore.read

    def failing(store: FolderStore, key: str) -> bytes:
        if key == "2/050.png":
            raise StoreError("away", transient=True)
        return read(store, key)

    with monkeypatch.context() as patch:
        patch.setattr(FolderStore, "read", failing)
        with pytest.raises(StoreError, match="away"):
            world.predict()
    target = world.processed.at(next(world.processed.list("predictions/")).key.rpartition("/")[0])
    before = stored(target)
    assert before
    second = world.predict()
    assert 0 < second.num_predicted < NUM_PICTURES
    files = stored(target)
    assert files.items() >= before.items()
    for key in list(files):
        target.delete(key)
    assert world.predict().num_predicted == NUM_PICTURES
    assert stored(target) == files


def test_pictures_that_cannot_be_used_have_the_reason(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.write("0/broken.jpg", b"\xff\xd8\xff no JPEG")
    world.write("0/animation.gif", b"GIF89a")
    world.write("0/notes.txt", b"no picture")
    world.write(".thumbnails/000.png", png(0))
    read = FolderStore.read

    def forbidding(store: FolderStore, key: str) -> bytes:
        if key == "1/001.png":
            raise StoreError("Could not read it. Check its permissions.")
        return read(store, key)

    with monkeypatch.context() as patch:
        patch.setattr(FolderStore, "read", forbidding)
        found = world.predict()
    rows = {str(row["path"]): row for row in rows_of(found)}
    assert len(rows) == NUM_PICTURES + 2
    assert found.num_predicted == NUM_PICTURES - 1
    for name, reason in {"0/broken.jpg": "JPEG", "0/animation.gif": "GIF", "1/001.png": "permissions"}.items():
        assert reason in str(rows[name]["reason"])
        assert rows[name]["class"] is rows[name]["probabilities"] is None
        assert name in dict(found.unusable)
    assert rows["1/001.png"]["sha256"] is None
    assert world.predict().num_predicted == 1  # what could not be read is tried again


def test_a_file_over_the_size_limit_is_not_tried_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.write("large.png", b"")
    os.truncate(world.photos / "large.png", SOURCE_LIMITS.max_bytes + 1)
    first = world.predict()
    (row,) = (row for row in rows_of(first) if row["reason"])
    assert (row["path"], row["sha256"]) == ("large.png", None)
    read: list[str] = []
    monkeypatch.setattr(run_module, "check_size", lambda *_: read.append("a picture"))
    assert world.predict().manifest == first.manifest
    assert read == []


def test_one_object_that_is_missing_is_a_row_and_no_permission_is_a_failure(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a store that is not a folder."""
    read = FolderStore.read
    errors: dict[str, StoreError] = {"1/001.png": ObjectNotFoundError("gone")}

    def failing(store: FolderStore, key: str) -> bytes:
        if key in errors:
            raise errors[key]
        return read(store, key)

    monkeypatch.setattr(FolderStore, "read", failing)
    monkeypatch.setattr(FolderStore, "local_path", lambda *_: None)
    assert world.predict().unusable == [("1/001.png", "gone")]
    errors["1/001.png"] = StoreError("AccessDenied")
    with pytest.raises(StoreError, match="AccessDenied"):
        world.predict()


def test_photographs_that_the_service_refuses_are_classified_one_at_a_time(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = Lock()
    locked: list[bool] = []

    def prepare(*arguments: Any, **limits: Any) -> Any:
        if limits:
            locked.append(lock.locked())
        return prepare_image(*arguments, **limits)

    monkeypatch.setattr(run_module, "_LARGE_PICTURE", lock)
    monkeypatch.setattr(run_module, "prepare_image", prepare)
    buffer = io.BytesIO()
    Image.new("RGB", (6000, 4000), "red").save(buffer, "JPEG")
    world.write("photo.jpg", buffer.getvalue())
    found = world.predict()
    assert found.num_predicted == NUM_PICTURES + 1
    assert found.unusable == []
    assert locked == [True]


def test_answers_that_are_not_finite(world: World) -> None:
    _, world.digest = store_tiny_model(world.models, onnx_bytes=tiny_onnx(breaks_on_white=True))
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), "white").save(buffer, "PNG")
    world.write("white.png", buffer.getvalue())
    found = world.predict()
    (row,) = (row for row in rows_of(found) if row["path"] == "white.png")
    assert row["reason"] == "the model's answer is not finite"


def test_a_source_without_pictures(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no pictures"):
        predict(str(tmp_path / "missing"), world.models, world.processed, world.digest, "float32")


def test_parts_depend_only_on_names_nearby(world: World) -> None:
    infos = list(FolderStore(world.photos).list())
    whole = {part.name: [info.key for info in part.infos] for part in slices(infos)}
    assert [name for names in whole.values() for name in names] == [info.key for info in infos]
    less = {part.name: [info.key for info in part.infos] for part in slices(infos[:40] + infos[41:])}
    assert len([name for name in whole if whole[name] != less.get(name)]) <= 2


def test_command(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.write("broken.jpg", b"")
    store = ["--store", str(world.root.root)]
    assert main([*store, "--model", world.digest, str(world.photos)]) == 0
    printed = capsys.readouterr().out
    assert "not usable: broken.jpg: Expected a PNG or JPEG image, got an empty file." in printed
    assert str(world.predict().manifest.digest) in printed
    assert main([*store, "--model", "0" * 64, str(world.photos)]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_command_refuses_a_model_below_the_threshold(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCURACY_THRESHOLD", "0.95")
    assert main(["--store", str(world.root.root), "--model", world.digest, str(world.photos)]) == 1
    assert "below the threshold" in capsys.readouterr().err


def materialize(world: World, *, source: Path | None, alone: bool) -> dg.ExecuteInProcessResult:
    @dg.asset(key=INFERENCE_SERVICE)
    def service() -> dg.MaterializeResult:
        return dg.MaterializeResult(data_version=dg.DataVersion(world.digest))

    definitions = dg.Definitions(
        assets=[service, predictions],
        resources={
            "object_store": LocalObjectStore(path=str(world.root.root)),
            "gate": AccuracyGate(threshold=0.85, precision="float32"),
        },
    )
    with dg.DagsterInstance.ephemeral() as instance:
        job = definitions.resolve_implicit_global_asset_job_def()
        selection = [INFERENCE_SERVICE, PREDICTIONS]
        if alone:
            job.execute_in_process(instance=instance, asset_selection=selection[:1])
            selection = selection[1:]
        config = {"ops": {PREDICTIONS.to_python_identifier(): {"config": {"source": str(source)}}}} if source else {}
        return job.execute_in_process(
            instance=instance, asset_selection=selection, run_config=config, raise_on_error=False
        )


def test_materialize_all_leaves_it_out_without_a_source(world: World) -> None:
    result = materialize(world, source=None, alone=False)
    assert result.success
    assert [event.asset_key for event in result.get_asset_materialization_events()] == [INFERENCE_SERVICE]


def failure(result: dg.ExecuteInProcessResult) -> str:
    (event,) = result.get_step_failure_events()
    return str(event.step_failure_data.error)


def test_alone_it_needs_a_source(world: World) -> None:
    assert "set it in the config" in failure(materialize(world, source=None, alone=True))


def test_a_model_of_unknown_origin_is_not_used(world: World) -> None:
    assert "never materialized" in failure(materialize(world, source=world.photos, alone=True))


def test_materialization(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the check of the model's origin is left out; tests/local uses a trained model."""
    monkeypatch.setattr(service_asset, "why_unproven", lambda *_: [])
    result = materialize(world, source=world.photos, alone=True)
    (made,) = result.asset_materializations_for_node(PREDICTIONS.to_python_identifier())
    found = world.predict()
    assert (made.tags or {})["dagster/data_version"] == found.manifest.digest
    assert made.metadata["dagster/row_count"].value == NUM_PICTURES
    schema = made.metadata["dagster/column_schema"].value
    assert isinstance(schema, dg.TableSchema)
    assert [column.name for column in schema.columns] == list(COLUMNS)
    observed = result.get_asset_observation_events()
    last = observed[-1].asset_observation_data.asset_observation
    assert last.metadata["num_classified"].value == NUM_PICTURES
