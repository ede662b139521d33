"""Sources of other classes and sizes than CIFAR-10's."""

import io
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cifar_assets.contracts import CIFAR10, CLASSES, ImageRequest
from cifar_assets.dataset.formats.images import prepare_image
from cifar_assets.dataset.formats.names import class_folders, class_of, split_of
from cifar_assets.dataset.formats.rows import Preparation, row_batches
from cifar_assets.dataset.index import index_of
from cifar_assets.dataset.sources.importing import import_source
from cifar_assets.dataset.versions.processed import build_processed
from cifar_assets.dataset.versions.raw import build_raw_version, read_raw
from cifar_assets.dataset.versions.reader import open_split
from cifar_assets.dataset.versions.splits import SPLIT_NAMES
from resources.errors import ConfigError, DataError
from resources.object_store import FolderStore


def picture(seed: int, width: int, height: int, mode: str = "RGB", kind: str = "PNG") -> bytes:
    pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def write_folders(
    folder: Path, classes: list[str], counts: dict[str, int], size: tuple[int, int], mode: str = "RGB"
) -> Path:
    """Class folders below folders of splits; classes have one to three pictures more in training."""
    seed = 0
    for split, count in counts.items():
        for number, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for _ in range(count + (number % 3 if split in ("", "train") else 0)):
                seed += 1
                (folder / split / name / f"{seed}.png").write_bytes(picture(seed, *size, mode))
    return folder


def test_cifar100_is_read_with_its_fine_labels(make, raw: FolderStore, tmp_path: Path) -> None:
    names = [f"kind {number}" for number in range(100)]
    members = {"meta": pickle.dumps({"fine_label_names": names, "coarse_label_names": names[:20]}, protocol=2)}
    for seed, (batch, count) in enumerate({"train": 300, "test": 100}.items()):
        fine = [number % 100 for number in range(count)]
        fields = {
            "data": make.images(count, seed).reshape(count, -1),
            "fine_labels": fine,
            "coarse_labels": [label // 5 for label in fine],
        }
        members[batch] = pickle.dumps(fields, protocol=2)
    path = tmp_path / "cifar-100-python.tar.gz"
    path.write_bytes(make.tar({f"cifar-100-python/{name}": data for name, data in members.items()}))
    version = build_raw_version(raw, str(path))
    assert (version.manifest.classes, version.manifest.image_size) == (tuple(names), 32)
    assert version.assumed[0].startswith("100 classes, as the source names them: kind 0, kind 1")
    index = index_of(raw, version.manifest.objects[0], version.manifest)
    assert index.labels.tolist() == [number % 100 for number in range(300)] + list(range(100))
    del members["meta"]
    path.write_bytes(make.tar({f"cifar-100-python/{name}": data for name, data in members.items()}))
    with pytest.raises(DataError, match="does not name its classes"):
        build_raw_version(raw, str(path))


COLUMNS = {
    "image and label": (["image", "label"], ["label"]),
    "img, fine_label and coarse_label": (["img", "fine_label", "coarse_label"], ["fine_label", "coarse_label"]),
    "other names": (["photo", "id", "breed"], ["breed"]),
}


@pytest.mark.parametrize(("columns", "labels"), COLUMNS.values(), ids=COLUMNS)
def test_hugging_face_columns(columns: list[str], labels: list[str], make, raw: FolderStore, tmp_path: Path) -> None:
    names = ["beagle", "collie", "pug"]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for split, count in {"train": 30, "validation": 9, "test": 9}.items():
        rows = [{"bytes": picture(count + row, 48, 48), "path": None} for row in range(count)]
        numbers = pa.array([row % 3 for row in range(count)], pa.int64())
        others = pa.array([row // 3 for row in range(count)], pa.int64())
        values = [pa.array(rows, kind), *(numbers if name == labels[0] else others for name in columns[1:])]
        table = pa.table(values, names=columns).replace_schema_metadata(make.names(names, labels[0]))
        pq.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet")
    version = build_raw_version(raw, str(tmp_path))
    assert version.manifest.spec.classes == tuple(names)
    assert version.manifest.image_size == 48
    assert {item.split: item.rows for item in version.manifest.objects} == {"train": 30, "validation": 9, "test": 9}
    (train,) = (item for item in version.manifest.objects if item.split == "train")
    assert index_of(raw, train, version.manifest).labels.tolist() == [row % 3 for row in range(30)]


def test_parquet_of_two_label_columns_is_refused(make, raw: FolderStore, tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"img": pa.array([], kind), "color": pa.array([], pa.int8()), "shape": pa.array([], pa.int8())})
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"color \(int8\), shape \(int8\).*call the one to read image or label"):
        import_source(str(tmp_path / "train.parquet"), raw)


def test_files_of_a_source_with_different_classes_are_refused(make, raw: FolderStore, tmp_path: Path) -> None:
    for split, names in {"train": ["a", "b"], "test": ["b", "a"]}.items():
        data = make.encoded_parquet([picture(1, 32, 32)], [0], make.names(names))
        (tmp_path / f"{split}.parquet").write_bytes(data)
    with pytest.raises(DataError, match=r"train\.parquet declares the classes \('a', 'b'\); expected \('b', 'a'\)"):
        build_raw_version(raw, str(tmp_path))


def test_classes_without_names_are_numbered_and_that_is_said(make, raw: FolderStore, tmp_path: Path) -> None:
    data = make.encoded_parquet([picture(row, 32, 32) for row in range(6)], [0, 1, 2] * 2, {})
    (tmp_path / "a.parquet").write_bytes(data)
    version = build_raw_version(raw, str(tmp_path / "a.parquet"))
    assert version.manifest.classes == ("0", "1", "2")
    assert version.assumed[0] == "3 classes without names in the source: they are called 0 to 2"
    named = build_raw_version(raw, str(tmp_path / "a.parquet"), ImageRequest(classes=("x", "y", "z")))
    assert named.manifest.classes == ("x", "y", "z")


FOLDERS = {
    "3 at 28, gray": (3, (28, 28), "L", 28),
    "37 at 50x40": (37, (50, 40), "RGB", 64),
    "200 at 16": (200, (16, 16), "RGB", 16),
    "3 at 224": (3, (224, 224), "RGB", 64),
}


@pytest.mark.parametrize(("count", "size", "mode", "expected"), FOLDERS.values(), ids=FOLDERS)
def test_class_folders_of_any_number_and_size(
    count: int,
    size: tuple[int, int],
    mode: str,
    expected: int,
    raw: FolderStore,
    processed: FolderStore,
    tmp_path: Path,
) -> None:
    classes = sorted(f"kind {number:03d}" for number in range(count))
    splits = {"train": 2, "val": 1, "test": 1}
    source = write_folders(tmp_path / "mine", classes, splits, size, mode)
    version = build_raw_version(raw, str(source))
    manifest = version.manifest
    assert (manifest.classes, manifest.image_size) == (tuple(classes), expected)
    built = build_processed(raw, processed, version.digest)
    per_class = {split: list(built.manifest.counts[split].values()) for split in SPLIT_NAMES}
    assert per_class == {
        "train": [2 + number % 3 for number in range(count)],
        "validation": [1] * count,
        "test": [1] * count,
    }
    image = open_split(processed, built.digest, "test").take([0])[0]
    assert image.shape == (3, expected, expected)
    if mode == "L":
        assert np.array_equal(image[0], image[1])
    if size == (50, 40):
        assert "pictures of 50x40 are cropped to squares and scaled to 64x64" in version.assumed


def test_source_without_test_folder_holds_images_out(raw: FolderStore, processed: FolderStore, tmp_path: Path) -> None:
    source = write_folders(tmp_path / "mine", ["cat", "dog"], {"train": 40, "validation": 5}, (32, 32))
    version = build_raw_version(raw, str(source))
    assert version.assumed == [
        "2 classes, from the folder names: cat, dog",
        "pictures keep their size of 32x32",
        "no test split: a part of the images is held out for testing",
    ]
    counts = build_processed(raw, processed, version.digest).manifest.counts
    assert sum(counts["validation"].values()) == 10
    assert sum(counts["train"].values()) + sum(counts["test"].values()) == 81
    assert 2 <= sum(counts["test"].values()) <= 16


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_pictures_are_made_square_as_the_data_set_says(fit, raw: FolderStore, tmp_path: Path) -> None:
    wide = np.zeros((50, 100, 3), np.uint8)
    wide[:, 25:75] = 255
    buffer = io.BytesIO()
    Image.fromarray(wide).save(buffer, "PNG")
    image = prepare_image(buffer.getvalue(), 40, fit)
    if fit == "crop":
        assert image.min() > 240
    else:
        assert image[:, :9].max() == image[:, 31:].max() == 0
        assert image[:, 10:30, 12:28].min() == 255
    assert prepare_image(picture(0, 5000, 1), 16, fit).shape == (3, 16, 16)
    source = write_folders(tmp_path / "mine", ["cat", "dog"], {"": 20}, (50, 40))
    version = build_raw_version(raw, str(source), ImageRequest(fit=fit, image_size=32))
    assert read_raw(raw, version.digest).fit == fit
    assert b'"fit"' in version.manifest.to_bytes() or fit == "crop"


def test_one_store_keeps_the_data_of_each_request_apart(raw: FolderStore, tmp_path: Path) -> None:
    """The same pictures in other classes, sizes and fits: nothing derived from one is used for another."""
    source = str(write_folders(tmp_path / "mine", ["cat", "dog"], {"": 20}, (50, 40)))
    requests = [
        ImageRequest(),
        ImageRequest(image_size=32),
        ImageRequest(image_size=32, fit="pad"),
        ImageRequest(image_size=32, classes=("dog", "cat")),
    ]
    versions = [build_raw_version(raw, source, wanted) for wanted in requests]
    assert len({version.digest for version in versions}) == 4
    indexes = [index_of(raw, version.manifest.objects[0], version.manifest) for version in versions]
    assert len({index.digests.tobytes() for index in indexes}) == 3
    assert indexes[1].labels.tolist() == (1 - indexes[3].labels).tolist()
    again = FolderStore(tmp_path / "again")
    assert [build_raw_version(again, source, wanted).digest for wanted in requests[::-1]] == [
        version.digest for version in versions[::-1]
    ]


def test_classes_that_the_source_does_not_have_are_refused(raw: FolderStore, tmp_path: Path) -> None:
    source = str(write_folders(tmp_path / "mine", ["cat", "dog", "cow"], {"": 9}, (32, 32)))
    with pytest.raises(DataError, match="no images of horse"):
        build_raw_version(raw, source, ImageRequest(classes=("cat", "horse")))
    version = build_raw_version(raw, source, ImageRequest(classes=("dog", "cat")))
    assert version.manifest.classes == ("dog", "cat")
    assert sum(reason == "only images in class folders are read" for reason in version.unread.values()) == 11
    with pytest.raises(ConfigError, match="draws at most 10 classes, not 11"):
        build_raw_version(raw, "synthetic", ImageRequest(classes=tuple("abcdefghijk")))


def test_folders_that_differ_in_case_only_are_refused(raw: FolderStore, tmp_path: Path) -> None:
    write_folders(tmp_path / "mine" / "train", ["Cat", "dog"], {"": 2}, (32, 32))
    write_folders(tmp_path / "mine" / "test", ["cat", "dog"], {"": 2}, (32, 32))
    with pytest.raises(DataError, match="several class folders 'cat' that differ in case only"):
        build_raw_version(raw, str(tmp_path / "mine"))


def test_an_archive_is_scaled_to_the_wanted_size(make, raw: FolderStore, tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(make.archive())
    version = build_raw_version(raw, str(path), ImageRequest(image_size=48))
    assert (version.manifest.image_size, version.manifest.rows) == (48, 120)
    with pytest.raises(DataError, match="Expected a 48x48 image, got 32x32"):
        build_raw_version(raw, str(path), ImageRequest(image_size=48), resize=False)


def test_synthetic_classes_are_not_said_to_come_from_folders(raw: FolderStore) -> None:
    assumed = build_raw_version(raw, "synthetic").assumed
    assert assumed[0] == f"10 classes, as the source names them: {', '.join(CIFAR10.classes)}"


def test_digest_of_cifar10_is_what_it_was(raw: FolderStore) -> None:
    manifest = build_raw_version(raw, "synthetic:4").manifest
    assert manifest.spec == CIFAR10
    assert sorted(manifest.model_dump(mode="json")) == ["classes", "kind", "objects", "resize"]


def test_landed_pictures_take_the_form_of_the_dataset(raw: FolderStore, tmp_path: Path) -> None:
    source = str(write_folders(tmp_path / "mine", ["cat", "dog"], {"": 20}, (28, 28), "L"))
    build_raw_version(raw, source)
    raw.write("landing/DOG/x.png", picture(99, 300, 200))
    version = build_raw_version(raw, source)
    assert version.landing.accepted == {"landing/DOG/x.png": 1}
    assert version.manifest.image_size == 28


def test_batches_and_shards_of_large_images_have_fewer_rows(raw: FolderStore, processed: FolderStore, tmp_path) -> None:
    how = Preparation(classes=("cat", "dog"), image_size=224, resize=True)
    pixels = np.zeros(how.image_shape, np.uint8)
    batches = list(row_batches(((None, 1) for _ in range(100)), lambda _: pixels, "train", how))
    assert [batch.images.nbytes <= 6 << 20 for batch in batches] == [True] * 3
    source = str(write_folders(tmp_path / "mine", ["cat", "dog"], {"train": 330, "val": 1, "test": 1}, (8, 8)))
    digest = build_raw_version(raw, source, ImageRequest(image_size=224)).digest
    shards = build_processed(raw, processed, digest).manifest.shards["train"]
    assert [shard.rows for shard in shards] == [334, 327]
    assert max(shard.size for shard in shards) < 52e6


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train/cat/1.png", "train"),
        ("data/Val/cat/1.png", "validation"),
        ("valid/cat/1.png", "validation"),
        ("validation-00000-of-00001.parquet", "validation"),
        ("train/test/1.png", "test"),
        ("cat/validated/1.png", None),
    ],
)
def test_split_of_a_name(name: str, split: str | None) -> None:
    assert split_of(name) == split


@pytest.mark.parametrize(
    ("names", "classes"),
    [
        (["dog/1.png", "cat/1.png", "1.png"], ("cat", "dog")),
        (["train/dog/1.png", "test/cat/1.png", "test/1.png"], ("cat", "dog")),
        (["photos/dog/a/1.png", "photos/cat/1.png"], ("cat", "dog")),
        (["photos/train/dog/1.png", "photos/val/cat/b/1.png"], ("cat", "dog")),
        (["cat/1.png"], ("cat",)),
        (["1.png"], ()),
    ],
)
def test_classes_of_folders(names: list[str], classes: tuple[str, ...]) -> None:
    assert class_folders(names) == classes
    assert all(class_of(name, classes) is not None for name in names if name.count("/") > 1)


def test_case_counts_where_classes_differ_in_it() -> None:
    assert [class_of(f"{name}/1.png", ("A", "a", "b")) for name in "AaBb"] == [0, 1, 2, 2]
    assert class_of("tabby_cat/1.png", ("tabby/cat", *CLASSES)) == 0


def test_packs_of_large_pictures_hold_fewer(raw: FolderStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = str(write_folders(tmp_path / "mine", ["cat", "dog"], {"": 10}, (50, 40)))
    whole = build_raw_version(raw, source).manifest
    monkeypatch.setattr("cifar_assets.dataset.sources.files._PACK_BYTES", whole.size // 2)
    halves = build_raw_version(raw, source).manifest
    assert len(whole.objects) == 1
    assert len(halves.objects) in (2, 3)
    assert (halves.rows, halves.spec) == (whole.rows, whole.spec)


def test_photograph_of_50_megapixels_is_data(raw: FolderStore, tmp_path: Path) -> None:
    source = write_folders(tmp_path / "mine", ["cat", "dog"], {"": 20}, (50, 40))
    buffer = io.BytesIO()
    Image.new("RGB", (8000, 6000), (200, 30, 30)).save(buffer, "JPEG")
    (source / "cat" / "photo.jpg").write_bytes(buffer.getvalue())
    version = build_raw_version(raw, str(source))
    assert version.manifest.rows == 42
    assert "pictures of 50x40 to 8000x6000 are cropped to squares and scaled to 64x64" in version.assumed
