"""The stored form of served traffic, and the statistics of its images."""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from cifar_assets.contracts import CIFAR10
from cifar_assets.traffic import records
from cifar_assets.traffic.records import Answered, BatchInfo, Traffic, read_traffic, write_batch
from cifar_assets.traffic.statistics import STATISTICS, image_statistics
from resources.errors import BucketNotFoundError, DataError
from resources.object_store import FolderStore

RANDOM = np.random.default_rng(0)
NOON = datetime(2026, 11, 27, 12, tzinfo=UTC).timestamp()


def answered(request_id: str, num_images: int) -> Answered:
    images = RANDOM.integers(0, 256, (num_images, 3, 32, 32), dtype=np.uint8)
    return Answered(request_id, NOON, 0.25, images, RANDOM.dirichlet(np.ones(10), num_images))


def info(model: str = "a", responses: Mapping[str, int] | None = None) -> BatchInfo:
    return BatchInfo(model_digest=model, model_version="1", images=CIFAR10, responses=dict(responses or {}))


def read_all(store: FolderStore) -> list[Traffic]:
    now = datetime.now(UTC)
    return read_traffic(store, now - timedelta(hours=1), now + timedelta(hours=1))


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path)


def test_a_batch_is_read_as_it_was_written(store: FolderStore) -> None:
    answers = [answered("one", 1), answered("two", 2)]
    write_batch(store, answers, info(responses={"200": 2, "400": 1}), keep_pixels=True)
    write_batch(store, [], info(responses={"400": 3}), keep_pixels=True)
    (traffic,) = read_all(store)
    images = np.concatenate([answer.images for answer in answers])
    assert traffic.table["request_id"].to_pylist() == ["one", "two", "two"]
    assert traffic.table["index"].to_pylist() == [0, 0, 1]
    assert traffic.table["model_digest"].to_pylist() == ["a"] * 3
    assert {str(time) for time in traffic.column("time")} == {"2026-11-27T12:00:00.000000"}
    np.testing.assert_allclose(traffic.column("seconds"), 0.25)
    np.testing.assert_allclose(traffic.probabilities, np.concatenate([each.probabilities for each in answers]), 1e-6)
    np.testing.assert_array_equal([traffic.image(row) for row in range(3)], images)
    np.testing.assert_allclose(traffic.statistics, image_statistics(images))
    assert traffic.info.responses == {"200": 2, "400": 4}
    assert traffic.info.images == CIFAR10


def test_without_pixels_only_their_statistics_are_stored(store: FolderStore) -> None:
    write_batch(store, [answered("one", 2)], info(), keep_pixels=False)
    (traffic,) = read_all(store)
    assert traffic.image(0) is None
    assert traffic.statistics.shape == (2, len(STATISTICS))


def test_traffic_is_grouped_by_model_the_newest_at_the_end(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for second, model in enumerate("abab"):
        monkeypatch.setattr(records, "_KEY_FORMAT", f"%Y-%m-%d/%H%M0{second}")
        write_batch(store, [answered(f"{second}", 1)], info(model), keep_pixels=True)
    monkeypatch.undo()
    found = {each.info.model_digest: each.table["request_id"].to_pylist() for each in read_all(store)}
    assert list(found.items()) == [("a", ["0", "2"]), ("b", ["1", "3"])]
    monkeypatch.setattr(records, "MAX_IMAGES", 1)
    assert [each.table["request_id"].to_pylist() for each in read_all(store)] == [["3"]]


def test_only_files_of_the_window_are_read(store: FolderStore) -> None:
    key = write_batch(store, [answered("one", 1)], info(), keep_pixels=True)
    written = datetime.strptime(key[:17], "%Y-%m-%d/%H%M%S").replace(tzinfo=UTC)
    assert read_traffic(store, written + timedelta(seconds=1), written + timedelta(days=3)) == []
    assert read_traffic(store, written - timedelta(days=3), written) == []
    assert len(read_traffic(store, written - timedelta(days=3), written + timedelta(seconds=1))) == 1


def test_foreign_file_is_an_error_that_names_it(store: FolderStore) -> None:
    store.write(f"{datetime.now(UTC):%Y-%m-%d/%H%M%S}-x.parquet", b"PAR1")
    with pytest.raises(DataError, match=r"x\.parquet is not a record of served traffic"):
        read_all(store)


def smooth_pictures() -> list[Image.Image]:
    noise = RANDOM.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    return [Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC) for pixels in noise]


def test_each_change_of_a_picture_moves_its_own_statistic() -> None:
    pictures = smooth_pictures()

    def of(change=lambda picture: picture) -> dict[str, float]:
        images = np.stack([np.asarray(change(picture)).transpose(2, 0, 1) for picture in pictures])
        return dict(zip(STATISTICS, image_statistics(images).mean(axis=0).tolist(), strict=True))

    usual = of()
    darker = of(lambda picture: ImageEnhance.Brightness(picture).enhance(0.5))
    assert darker["brightness"] == pytest.approx(usual["brightness"] / 2, rel=0.03)
    assert darker["saturation"] == pytest.approx(usual["saturation"], rel=0.05)
    assert darker["sharpness"] == pytest.approx(usual["sharpness"], rel=0.05)
    assert of(lambda picture: ImageEnhance.Contrast(picture).enhance(0.5))["contrast"] < 0.7 * usual["contrast"]
    assert of(lambda picture: ImageEnhance.Color(picture).enhance(0))["saturation"] == 0
    assert of(lambda picture: picture.filter(ImageFilter.GaussianBlur(2)))["sharpness"] < 0.7 * usual["sharpness"]


def test_statistics_of_flat_and_of_no_images_are_finite() -> None:
    flat = np.stack([np.full((3, 32, 32), value, np.uint8) for value in (0, 255)])
    np.testing.assert_allclose(image_statistics(flat), [[0, 0, 0, 0], [1, 0, 0, 0]], atol=1e-3)
    assert image_statistics(flat[:0]).shape == (0, 4)


def test_a_store_without_the_bucket_has_no_records(store: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(prefix: str) -> None:
        raise BucketNotFoundError(f"{store.uri(prefix)}: no such bucket.")

    monkeypatch.setattr(store, "list", refuse)
    assert read_all(store) == []
