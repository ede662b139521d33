import errno
import os
import pickle
import urllib.parse
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cifar_assets.contracts import CLASSES, ImageRequest
from cifar_assets.dataset.formats.names import split_of
from cifar_assets.dataset.formats.rows import SPLITS
from cifar_assets.dataset.index import index_of, pixel_digests
from cifar_assets.dataset.objects import RawObject
from cifar_assets.dataset.sources import synthetic
from cifar_assets.dataset.sources.importing import import_source
from cifar_assets.dataset.versions.raw import build_raw_version, current_raw_digest, make_current
from resources.digests import sha256_bytes
from resources.errors import ConfigError, DataError
from resources.object_store import FolderStore, ObjectInfo
from tests.fixtures.s3 import S3Server
from tests.unit.dataset.conftest import AS_IS


def by_split(raw: FolderStore, objects: Iterable[RawObject]) -> dict[str, dict[bytes, int]]:
    """Label by pixel digest, per split."""
    found: dict[str, dict[bytes, int]] = {}
    for item in objects:
        index = index_of(raw, item, AS_IS)
        for (digest, label, _), split in zip(index.images(), index.splits, strict=True):
            found.setdefault(SPLITS[split], {})[digest] = label
    return found


def expected_batches(make, numbers: range) -> dict[bytes, int]:
    labels = make.labels(make.rows).tolist() * len(numbers)
    images = np.concatenate([make.images(make.rows, number) for number in numbers])
    return dict(zip([row.tobytes() for row in pixel_digests(images)], labels, strict=True))


@pytest.mark.parametrize("kind", ["python.tar.gz", "binary.tgz"])
def test_official_layouts_give_the_same_images(kind: str, make, raw: FolderStore, tmp_path: Path) -> None:
    members = make.binary_members() if "binary" in kind else make.python_members()
    path = tmp_path / f"cifar-10-{kind}"
    path.write_bytes(make.tar(members))
    found = by_split(raw, import_source(str(path), raw).objects)
    assert found == {"train": expected_batches(make, range(5)), "test": expected_batches(make, range(5, 6))}


def test_parquet_shards_take_their_split_from_their_names(make, raw: FolderStore, source: str) -> None:
    objects = import_source(source, raw).objects
    assert [(item.split, item.rows) for item in objects] == [("test", 20), ("train", 60)]
    found = by_split(raw, objects)
    assert list(found["train"]) == [row.tobytes() for row in pixel_digests(make.images(60))]
    assert list(found["train"].values()) == make.labels(60).tolist()


def test_symlinked_shards_are_read(make, raw: FolderStore, source: str, tmp_path: Path) -> None:
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for file in Path(source).iterdir():
        (linked / file.name).symlink_to(file)
    assert sum(item.rows for item in import_source(str(linked), raw).objects) == 80


@pytest.mark.parametrize("with_split", [True, False])
def test_class_folders(with_split: bool, make, raw: FolderStore, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    images = make.images(40)
    for number, image in enumerate(images):
        split = ("test/" if number >= 30 else "train/") if with_split else ""
        path = folder / f"{split}{CLASSES[number % 10]}/{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(make.png(image))
    folder.joinpath("notes.txt").write_text("not data")
    folder.joinpath(".DS_Store").write_bytes(b"x")
    imported = import_source(str(folder), raw)
    assert imported.unread == {".DS_Store": "hidden", "notes.txt": "only images in class folders are read"}
    found = by_split(raw, imported.objects)
    digests = [row.tobytes() for row in pixel_digests(images)]
    expected = {digest: number % 10 for number, digest in enumerate(digests)}
    if with_split:
        assert {split: len(rows) for split, rows in found.items()} == {"train": 30, "test": 10}
        assert found["train"] | found["test"] == expected
        assert set(found["test"]) == set(digests[30:])
    else:
        assert found == {"any": expected}


def test_packing_class_folders_depends_on_content_alone(make, raw: FolderStore, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_classes(make, tmp_path / name)
    (tmp_path / "two" / "cat" / "0.png").touch()
    assert import_source(str(tmp_path / "one"), raw) == import_source(str(tmp_path / "two"), raw)


def test_synthetic_is_the_same_everywhere_and_balanced() -> None:
    images, labels = synthetic.draw_split(3, "train", 200)
    again, _ = synthetic.draw_split(3, "train", 200)
    other, _ = synthetic.draw_split(4, "train", 200)
    test, _ = synthetic.draw_split(3, "test", 200)
    assert np.array_equal(images, again)
    assert not np.array_equal(images, other)
    assert not np.array_equal(images, test)
    assert np.bincount(labels).tolist() == [20] * 10
    # Pinned: another digest means that stored synthetic versions change.
    assert pixel_digests(images[:1])[0].tobytes().hex()[:16] == PINNED


PINNED = "9613ed8302e65f18"


def test_a_linear_model_fails_on_synthetic_data() -> None:
    images, labels = synthetic.draw_split(0, "train", 3000)
    test_images, test_labels = synthetic.draw_split(0, "test", 1000)
    features = np.c_[images.reshape(len(images), -1)[:, ::4] / 255.0 - 0.5, np.ones(len(images))]
    targets = np.eye(10)[labels]
    weights = np.linalg.solve(features.T @ features + 10 * np.eye(features.shape[1]), features.T @ targets)
    test_features = np.c_[test_images.reshape(len(test_images), -1)[:, ::4] / 255.0 - 0.5, np.ones(len(test_images))]
    assert ((test_features @ weights).argmax(1) == test_labels).mean() < 0.5


@pytest.mark.parametrize("bad", ["synthetic:x", "synthetic:-1", "/nowhere/at/all", "nowhere", "file:///nowhere"])
def test_impossible_source_names_the_choices(bad: str, raw: FolderStore) -> None:
    with pytest.raises(ConfigError, match="synthetic"):
        import_source(bad, raw)


def test_unknown_folder_layout_is_refused_with_what_it_holds(raw: FolderStore, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.docx").write_text("x")
    with pytest.raises(DataError, match=r"chapter\.docx.*Expected"):
        import_source(str(tmp_path / "thesis"), raw)


def test_archive_in_a_folder_is_not_a_source_by_its_folder(make, raw: FolderStore, tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(make.archive())
    with pytest.raises(DataError, match=r"found a\.tar\.gz.*For an official archive, name the file"):
        import_source(str(tmp_path), raw)


@pytest.mark.parametrize(
    ("encoded", "label", "reason"),
    [
        (b"no image", 3, "row 1"),
        (None, 3, "row 1: Expected a PNG or JPEG image, got an empty file"),
        (None, 10, "out of range"),
        (None, None, "label None"),
    ],
)
def test_a_bad_row_in_a_source_is_named(encoded, label, reason: str, make, raw: FolderStore, tmp_path: Path) -> None:
    good = make.png(make.images(1)[0])
    path = tmp_path / "train.parquet"
    path.write_bytes(make.encoded_parquet([good, encoded], [0, label]))
    with pytest.raises(DataError, match=reason):
        import_source(str(path), raw)
    assert list(raw.list("objects/")) == []


def test_foreign_parquet_columns_are_refused(raw: FolderStore, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a"], "label": [1]}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"expected one column of pictures.*got text \(string\), label"):
        import_source(str(tmp_path / "train.parquet"), raw)


def test_a_bad_picture_of_a_class_folder_is_named(make, raw: FolderStore, tmp_path: Path) -> None:
    write_classes(make, tmp_path / "data", ["cat", "dog"])
    (tmp_path / "data" / "cat" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1 of 4 rows.*cat/1\.png: Expected"):
        import_source(str(tmp_path / "data"), raw)


def test_digest_of_several_files_is_refused(raw: FolderStore, source: str) -> None:
    with pytest.raises(ConfigError, match="not a single file"):
        import_source(f"{source}#sha256={'0' * 64}", raw)


def test_bad_rows_known_from_the_landing_zone_are_refused_in_a_source_too(
    make, raw: FolderStore, source: str, tmp_path: Path
) -> None:
    data = make.encoded_parquet([make.png(make.images(1, 9)[0]), b"no image"], [0, 1])
    raw.write("landing/train.parquet", data)
    build_raw_version(raw, source)
    folder = tmp_path / "corrected"
    folder.mkdir()
    (folder / "train.parquet").write_bytes(data)
    (folder / "test.parquet").write_bytes(make.parquet(make.images(2, 3), make.labels(2)))
    with pytest.raises(DataError, match="1 of 2 rows cannot be used"):
        import_source(str(folder), raw)


def test_parquet_that_declares_another_class_order_is_refused(make, raw: FolderStore, tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    path.write_bytes(make.encoded_parquet([make.png(make.images(1)[0])], [0], make.names(CLASSES[::-1])))
    with pytest.raises(DataError, match="Labels would mean other classes"):
        import_source(str(path), raw, ImageRequest(classes=CLASSES))


def test_an_archive_with_other_label_names_is_refused(make, raw: FolderStore, tmp_path: Path) -> None:
    members = make.binary_members()
    members["cifar-10-batches-bin/batches.meta.txt"] = b"cat\ndog\n"
    path = tmp_path / "a.tar.gz"
    path.write_bytes(make.tar(members))
    with pytest.raises(DataError, match="Labels would mean other classes"):
        import_source(str(path), raw, ImageRequest(classes=CLASSES))


def test_importing_again_stores_nothing_and_repairs_a_damaged_copy(raw: FolderStore, source: str) -> None:
    first = import_source(source, raw).objects
    etags = {info.key: info.etag for info in raw.list("objects/")}
    assert import_source(source, raw).objects == first
    assert {info.key: info.etag for info in raw.list("objects/")} == etags
    good = raw.read(first[0].key)
    raw.write(first[0].key, good[:-1] + b"?")
    assert import_source(source, raw).objects == first
    assert raw.read(first[0].key) == good


def test_a_repeated_image_in_a_source_is_used_once(make, raw: FolderStore, tmp_path: Path) -> None:
    folder = make.parquet_source(tmp_path / "source", 30, 10)
    test_image, twice = make.images(1, 1)[0], make.images(1)[0]
    conflicting = make.images(2, 9)[1]
    images = np.stack([*make.images(30), twice, test_image, conflicting, conflicting])
    labels = [*make.labels(30), 0, 0, 1, 2]
    folder.joinpath("train-00000-of-00001.parquet").write_bytes(make.parquet(images, labels))
    version = build_raw_version(raw, str(folder))
    train = next(item for item in version.manifest.objects if item.split == "train")
    assert train.excluded == ((30, 34),)
    assert version.manifest.rows == 40
    assert sorted(version.left_out.values()) == [1, 1, 2]


def write_classes(make, folder: Path, names: Iterable[str] = CLASSES) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        for copy in range(2):
            seed = 10 * CLASSES.index(name) + copy
            (folder / name / f"{copy}.png").write_bytes(make.png(make.images(1, seed)[0]))
    return folder


def test_unread_files_are_named(make, raw: FolderStore, tmp_path: Path) -> None:
    folder = write_classes(make, tmp_path / "pictures")
    (folder / "cat" / "gone.png").symlink_to(tmp_path / "nothing")
    (folder / "cat" / "notes.txt").write_text("x")
    (folder / "a.png").write_bytes(b"x")
    (folder / ".cache" / "dog").mkdir(parents=True)
    (folder / ".cache" / "dog" / "1.png").write_bytes(b"x")
    (folder / ".cache" / "ferry").symlink_to(folder / "ship")
    os.mkfifo(folder / "cat" / "pipe.png")
    Path(os.fsdecode(os.fsencode(folder / "cat") + b"/\xff.png")).write_bytes(b"x")
    only = "only images in class folders are read"
    assert build_raw_version(raw, str(folder)).unread == {
        "cat/gone.png": "a broken link",
        "cat/notes.txt": only,
        "a.png": only,
        ".cache/dog/1.png": "hidden",
        ".cache/ferry": "a link to a folder: copy the folder, or link its files",
        "cat/pipe.png": "not a file",
        "cat/\\udcff.png": "its name is not UTF-8",
    }


@pytest.mark.parametrize("name", ["test", "train/cat"])
def test_link_to_a_folder_is_refused(name: str, make, raw: FolderStore, tmp_path: Path) -> None:
    write_classes(make, tmp_path / "elsewhere")
    write_classes(make, tmp_path / "pictures" / "train", ["dog"])
    (tmp_path / "pictures" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=f"{name} is a link to a folder: copy the folder, or link its files, or remove"):
        import_source(str(tmp_path / "pictures"), raw)
    assert list(raw.list()) == []


@pytest.mark.parametrize("name", ["test", "test/cat", "train/dog", "ship/more"])
def test_folder_of_a_split_or_class_that_cannot_be_read_is_refused(
    name: str, make, raw: FolderStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_classes(make, tmp_path / "pictures")
    (folder / name).mkdir(parents=True)
    (folder / "lost+found").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path) in unreadable:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    unreadable = [str(folder / "lost+found")]
    assert import_source(str(folder), raw).unread == {"lost+found": "not readable: Permission denied"}
    unreadable.append(str(folder / name))
    with pytest.raises(DataError, match=rf"{name} cannot be read \(not readable: Permission denied\), and may hold"):
        import_source(str(folder), raw)


@pytest.mark.parametrize("name", ["test", "train", "test/cat", "test-00000-of-00001.parquet"])
def test_broken_link_in_a_source_is_rejected(name: str, make, raw: FolderStore, tmp_path: Path) -> None:
    folder = write_classes(make, tmp_path / "pictures")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(tmp_path / "nothing")
    with pytest.raises(DataError, match=rf"{name} cannot be read \(a broken link\), and may hold"):
        import_source(str(folder), raw)


def test_members_of_an_archive_that_are_not_read_are_named(make, raw: FolderStore, tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(make.tar({**make.python_members(), "cifar-10-batches-py/readme.html": b"x"}))
    for _ in range(2):  # the second time from the index
        unread = build_raw_version(raw, str(path)).unread
        assert unread == {f"{path}, member cifar-10-batches-py/readme.html": "not a batch"}


def test_archive_with_an_empty_batch_is_refused(make, raw: FolderStore, tmp_path: Path) -> None:
    batch = {"data": np.zeros((0, 3072), np.uint8), "labels": []}
    path = tmp_path / "a.tar.gz"
    path.write_bytes(make.tar(make.python_members() | {"cifar-10-batches-py/test_batch": pickle.dumps(batch)}))
    with pytest.raises(DataError, match="test_batch' has no images"):
        build_raw_version(raw, str(path))
    assert list(raw.list()) == []


def test_version_without_a_class_does_not_become_current(make, raw: FolderStore, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(make.parquet(make.images(60), make.labels(60)))
    whole = build_raw_version(raw, str(path))
    path.write_bytes(make.parquet(make.images(60), make.labels(60) % 9))
    nine = build_raw_version(raw, str(path))
    assert current_raw_digest(raw) == whole.digest
    with pytest.raises(DataError, match="no images of truck"):
        make_current(raw, nine.digest)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("test.parquet", True),
        ("TEST-00000-of-00001.parquet", True),
        ("test-00000-of-00001-a09b74b3ef9c3b56.parquet", True),
        ("plain_text/test/0000.parquet", True),
        ("field_test_may/batch1.parquet", False),
        ("contest/latest.parquet", False),
        ("test_drive.parquet", False),
        ("train-00000-of-00001.parquet", False),
    ],
)
def test_parquet_file_is_test_data_only_by_the_documented_names(name: str, expected: bool) -> None:
    assert (split_of(name) == "test") == expected


def test_rows_below_a_folder_with_test_in_its_name_are_training_data(make, raw: FolderStore, source: str) -> None:
    raw.write("landing/field_test_may/batch1.parquet", make.parquet(make.images(3, 7), [0, 1, 2]))
    version = build_raw_version(raw, source)
    assert version.landing.accepted == {"landing/field_test_may/batch1.parquet": 3}


@pytest.mark.parametrize("name", ["cifar10-test.parquet", "test_images/a.parquet", "testing-0.parquet"])
def test_unclear_name_in_a_source_is_refused(name: str, make, raw: FolderStore, tmp_path: Path) -> None:
    path = tmp_path / "data" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(make.parquet(make.images(3), [0, 1, 2]))
    with pytest.raises(DataError, match=f"not clear whether {name} belongs to a test split"):
        import_source(str(tmp_path / "data"), raw)


NAMES = ["50%25off", "50%off", "a b", "a+b", "a#b", "a?b", "caf\u00e9", "cafe\u0301", "A", "x" * 200, "%2e%2e", "a&b=c"]


@pytest.mark.parametrize("name", NAMES)
def test_path_names_exactly_the_file(name: str, make, raw: FolderStore, tmp_path: Path) -> None:
    path = make.parquet_source(tmp_path / name, train=20, test=10)
    decoy = tmp_path / urllib.parse.unquote(name).partition("#")[0].partition("?")[0]
    if decoy != path:
        decoy.mkdir(exist_ok=True)
    assert sum(item.rows for item in import_source(str(path), raw).objects) == 30


@pytest.mark.parametrize("name", [*NAMES, "/a", "a//b"])
def test_s3_addresses_name_exactly_the_key(name: str, make, raw: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Fake:
        def __init__(self, bucket: str):
            self.bucket = bucket

        def local_path(self, key: str) -> None:
            return None

        def exists(self, key: str) -> bool:
            asked.append(f"{self.bucket}/{key}")
            return False

        def list(self, prefix: str) -> list[ObjectInfo]:
            asked.append(f"{self.bucket}/{prefix}")
            return []

    monkeypatch.setattr("resources.object_store.s3.S3Store.from_environment", Fake)
    with pytest.raises(ConfigError, match="there is no file, folder, object or prefix"):
        import_source(f"s3://bucket/{name}/x", raw)
    assert asked == [f"bucket/{name}/x", f"bucket/{name}/x/"]


def test_picture_too_large_is_refused_before_it_is_read(make, raw: FolderStore, tmp_path: Path) -> None:
    folder = write_classes(make, tmp_path / "pictures")
    with (folder / "cat" / "0.png").open("r+b") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match=r"cat/0\.png has 1,099,511,627,776 bytes; at most 20,971,520 are read"):
        import_source(str(folder), raw)


def test_empty_value_of_parquet_is_named(make, raw: FolderStore, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(make.encoded_parquet([b"", make.png(make.images(1)[0])], [0, 1]))
    with pytest.raises(DataError, match="row 0: Expected a PNG or JPEG image, got an empty file"):
        import_source(str(path), raw)


@pytest.mark.s3
def test_keys_of_a_real_server_are_read_as_they_are_written(
    make, raw: FolderStore, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in s3_server.environment().items():
        monkeypatch.setenv(variable, value)
    bucket = s3_server.new_bucket()
    store = s3_server.store(bucket)
    digests = {}
    for number, name in enumerate(NAMES):
        data = make.parquet(make.images(10, number), make.labels(10))
        store.write(f"{name}/{name}.parquet", data)
        digests[name] = sha256_bytes(data)
    for name in NAMES:
        for address in (f"s3://{bucket}/{name}/{name}.parquet", f"s3://{bucket}/{name}", f"s3://{bucket}/{name}/"):
            assert [item.sha256 for item in import_source(address, raw).objects] == [digests[name]], address
