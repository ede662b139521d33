from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifar_assets.dataset.sheet import sample_sheet
from cifar_assets.dataset.versions.processed import build_processed, list_processed_versions, read_processed
from cifar_assets.dataset.versions.raw import build_raw_version
from cifar_assets.dataset.versions.reader import open_split
from cifar_assets.dataset.versions.shards import channel_totals, mean_and_std
from cifar_assets.dataset.versions.splits import SPLIT_NAMES, SplitConfig
from resources.errors import DataError, IntegrityError, ObjectNotFoundError, StoreError
from resources.object_store import FolderStore

HALF = SplitConfig(validation_fraction=0.5)


def splits(processed: FolderStore, digest: str) -> dict[str, str]:
    """Split by pixel digest."""
    found = {}
    for split in SPLIT_NAMES:
        reader = open_split(processed, digest, split)
        found |= {reader.digest(i): split for i in range(len(reader))}
    return found


def test_pixels_labels_and_origins_match_the_source(make, raw, processed, source: str) -> None:
    version = build_raw_version(raw, source)
    built = build_processed(raw, processed, version.digest, HALF)
    images, test_images = make.images(60), make.images(20, 1)
    test_object = next(n for n, item in enumerate(version.manifest.objects) if item.split == "test")
    total = 0
    for split in SPLIT_NAMES:
        reader = open_split(processed, built.digest, split)
        total += len(reader)
        for i in range(len(reader)):
            row = int(reader.rows[i])
            expected = test_images[row] if reader.objects[i] == test_object else images[row]
            assert np.array_equal(reader.take([i])[0], expected)
            assert reader.labels[i] == row % 10
    assert total == 80
    assert built.manifest.count("test") == 20


def test_the_same_input_gives_the_same_bytes(raw, source: str, tmp_path: Path) -> None:
    version = build_raw_version(raw, source)
    stores = [FolderStore(tmp_path / name) for name in ("one", "two")]
    digests = [build_processed(raw, store, version.digest, HALF).digest for store in stores]
    assert digests[0] == digests[1]
    files = [{info.key: store.read(info.key) for info in store.list()} for store in stores]
    assert files[0] == files[1]


def test_adding_data_does_not_move_images_between_splits(make, raw, processed, source: str) -> None:
    before = build_processed(raw, processed, build_raw_version(raw, source).digest, HALF).digest
    raw.write("landing/a.parquet", make.parquet(make.images(200, 5), make.labels(200)))
    after = build_processed(raw, processed, build_raw_version(raw, source).digest, HALF).digest
    old, new = splits(processed, before), splits(processed, after)
    assert len(new) == len(old) + 200
    assert {digest: new[digest] for digest in old} == old
    # Landed images are never tested on.
    assert sum(split == "test" for split in new.values()) == 20


def test_a_source_without_a_test_split_gets_one_by_digest(make, raw, processed, tmp_path: Path) -> None:
    path = tmp_path / "all.parquet"
    path.write_bytes(make.parquet(make.images(300), make.labels(300)))
    config = SplitConfig(test_fraction=0.2)
    before = build_processed(raw, processed, build_raw_version(raw, str(path)).digest, config)
    assert 30 < before.manifest.count("test") < 90
    raw.write("landing/a.parquet", make.parquet(make.images(100, 5), make.labels(100)))
    after = build_processed(raw, processed, build_raw_version(raw, str(path)).digest, config)
    assert after.manifest.count("test") == before.manifest.count("test")
    old, new = splits(processed, before.digest), splits(processed, after.digest)
    assert {digest: new[digest] for digest in old} == old


def test_statistics_are_of_the_train_split(raw, processed, source: str) -> None:
    built = build_processed(raw, processed, build_raw_version(raw, source).digest, HALF)
    images = open_split(processed, built.digest, "train").images / 255.0
    assert built.manifest.mean == pytest.approx(images.mean(axis=(0, 2, 3)), abs=1e-8)
    assert built.manifest.std == pytest.approx(images.std(axis=(0, 2, 3)), abs=1e-8)


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 9), max_size=5))
def test_statistics_do_not_depend_on_how_images_are_batched(seed: int, cuts: list[int]) -> None:
    images = np.random.RandomState(seed).randint(0, 256, (10, 3, 32, 32)).astype(np.uint8)
    parts = [channel_totals(part) for part in np.split(images, sorted(cuts))]
    assert mean_and_std(channel_totals(images)) == mean_and_std(np.sum(parts, axis=0))


@pytest.mark.parametrize("rows", [1, 7, 30, 1000])
def test_shards_behave_as_one(rows: int, raw, processed, source: str) -> None:
    digest = build_raw_version(raw, source).digest
    sharded = build_processed(raw, processed, digest, SplitConfig(validation_fraction=0.5, max_shard_rows=rows))
    whole = build_processed(raw, processed, digest, HALF)
    for split in SPLIT_NAMES:
        one, many = (open_split(processed, built.digest, split) for built in (whole, sharded))
        assert all(shard.rows <= rows for shard in sharded.manifest.shards[split])
        assert np.array_equal(one.images, many.images)
        assert np.array_equal(one.labels, many.labels)
        assert np.array_equal(one.digests, many.digests)
        order = np.random.RandomState(0).permutation(len(one))
        assert np.array_equal(many.take(order), one.images[order])
        assert np.array_equal(many.take([3, 3, 0]), one.images[[3, 3, 0]])


def test_reading_maps_the_file(raw, processed, source: str) -> None:
    built = build_processed(raw, processed, build_raw_version(raw, source).digest)
    reader = open_split(processed, built.digest, "train")
    assert isinstance(reader.images, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        reader.images[0] = 0
    with pytest.raises(IndexError):
        reader.take([len(reader)])
    with pytest.raises(IndexError):
        reader.take([-1])


def test_an_empty_validation_split_can_be_opened(raw, processed, source: str) -> None:
    built = build_processed(raw, processed, build_raw_version(raw, source).digest, SplitConfig(validation_fraction=0))
    reader = open_split(processed, built.digest, "validation")
    assert (len(reader), reader.images.shape, reader.take([]).shape) == (0, (0, 3, 32, 32), (0, 3, 32, 32))


def test_no_test_images_is_an_error(make, raw, processed, tmp_path: Path) -> None:
    path = tmp_path / "all.parquet"
    path.write_bytes(make.parquet(make.images(3), make.labels(3)))
    digest = build_raw_version(raw, str(path)).digest
    with pytest.raises(DataError, match="no images for the test split"):
        build_processed(raw, processed, digest, SplitConfig(test_fraction=1e-9))
    assert list_processed_versions(processed) == []


def test_a_changed_raw_object_is_noticed(raw, processed, source: str) -> None:
    version = build_raw_version(raw, source)
    key = version.manifest.objects[0].key
    raw.write(key, raw.read(key)[:-1] + b"?")
    with pytest.raises(IntegrityError, match="materialize its asset again"):
        build_processed(raw, processed, version.digest)
    assert list_processed_versions(processed) == []


@pytest.mark.parametrize("is_remote", [False, True])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_a_damaged_shard_is_noticed_and_built_again(
    damage: str, is_remote: bool, raw, processed, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_remote:
        monkeypatch.setattr(FolderStore, "local_path", lambda store, key: None)
    raw_digest = build_raw_version(raw, source).digest
    built = build_processed(raw, processed, raw_digest)
    assert build_processed(raw, processed, raw_digest).reused
    key = built.manifest.shards["train"][0].file
    good = processed.read(key)
    if damage == "delete":
        processed.delete(key)
    else:
        processed.write(key, good[:-1] + b"?" if damage == "flip" else good[: len(good) // 2])
    with pytest.raises((IntegrityError, ObjectNotFoundError), match=r"materialize .* again"):
        open_split(processed, built.digest, "train", tmp_path / "cache")
    again = build_processed(raw, processed, raw_digest)
    assert (again.digest, again.reused) == (built.digest, False)
    assert processed.read(key) == good


def test_outage_is_not_treated_as_damage(raw, processed, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = build_raw_version(raw, source).digest
    build_processed(raw, processed, digest)

    def away(*arguments: object) -> None:
        raise StoreError("away", transient=True)

    monkeypatch.setattr(processed, "local_path", lambda key: None)
    monkeypatch.setattr(processed, "download", away)
    with pytest.raises(StoreError, match="away"):
        build_processed(raw, processed, digest)


def test_version_is_visible_only_with_its_manifest(raw, source: str, tmp_path: Path) -> None:
    class Failing(FolderStore):
        def write(self, key: str, data: bytes) -> None:
            raise KeyboardInterrupt

    digest = build_raw_version(raw, source).digest
    store = Failing(tmp_path / "processed")
    with pytest.raises(KeyboardInterrupt):
        build_processed(raw, store, digest)
    assert list_processed_versions(store) == []
    built = build_processed(raw, FolderStore(store.root), digest)
    assert list_processed_versions(store) == [built.digest]
    assert read_processed(store, built.digest) == built.manifest


def test_the_sheet_is_a_picture_of_each_class(raw, processed, source: str) -> None:
    import io

    from PIL import Image

    built = build_processed(raw, processed, build_raw_version(raw, source).digest)
    reader = open_split(processed, built.digest, "train")
    sheet = np.asarray(Image.open(io.BytesIO(sample_sheet(reader, per_class=3))))
    first_cat = reader.take([int(np.flatnonzero(reader.labels == 3)[0])])[0]
    top, left = 3 * 66, 84
    assert np.array_equal(sheet[top : top + 64 : 2, left : left + 64 : 2], first_cat.transpose(1, 2, 0))
    assert sample_sheet(reader, per_class=3) == sample_sheet(reader, per_class=3)
