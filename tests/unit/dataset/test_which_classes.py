"""Which classes a source has if the data set declares none, and which folders are classes or splits."""

import pickle
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cifar_assets.contracts import CLASSES, ImageRequest
from cifar_assets.dataset.formats.archive import BATCHES
from cifar_assets.dataset.index import index_of
from cifar_assets.dataset.sources.importing import Imports, import_source
from resources.errors import DataError
from resources.object_store import FolderStore

BESIDE = [f"lab_{'ab'[number % 2]}/{name.title()}" for number, name in enumerate(CLASSES)]


@pytest.fixture
def folders(make, tmp_path: Path):
    """Writes one picture for each name of a folder."""

    def write(names: Iterable[str]) -> str:
        for number, name in enumerate(names):
            path = tmp_path / "mine" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(make.png(make.images(1, number)[0]))
        return str(tmp_path / "mine")

    return write


@pytest.fixture
def write(make, tmp_path: Path):
    """Writes Parquet files with these labels and no names of classes."""

    def write(*labels: list[int]) -> str:
        (tmp_path / "mine").mkdir()
        for number, each in enumerate(labels):
            data = make.encoded_parquet([make.png(image) for image in make.images(len(each), number)], each, {})
            (tmp_path / "mine" / f"{number}.parquet").write_bytes(data)
        return str(tmp_path / "mine")

    return write


def labels_of(raw: FolderStore, imported: Imports) -> list[int]:
    return [label for item in imported.objects for label in index_of(raw, item, imported.how).labels.tolist()]


@pytest.mark.parametrize("names", [[name.title() for name in CLASSES], BESIDE], ids=["other case", "below others"])
def test_folders_of_cifar10_are_cifar10(names: list[str], folders, raw: FolderStore) -> None:
    imported = import_source(folders(names), raw)
    assert imported.how.classes == CLASSES
    assert sorted(labels_of(raw, imported)) == list(range(10))


def test_a_folder_beside_those_of_cifar10_is_not_read(folders, raw: FolderStore) -> None:
    imported = import_source(folders([*CLASSES, "thumbs", "train/thumbs"]), raw)
    assert imported.how.classes == CLASSES
    only = "only images in class folders are read"
    assert imported.unread == {"thumbs/10.png": only, "train/thumbs/11.png": only}


def test_half_of_cifar10_is_refused_unless_it_is_declared(folders, raw: FolderStore) -> None:
    source = folders(CLASSES[:6])
    with pytest.raises(DataError, match=r"no images of frog, horse, ship, truck.*or declare the classes in DATA_SETS"):
        import_source(source, raw)
    assert import_source(source, raw, ImageRequest(classes=CLASSES[:6])).how.classes == CLASSES[:6]


def test_few_classes_of_cifar10_are_a_data_set(folders, raw: FolderStore) -> None:
    assert import_source(folders(CLASSES[:5]), raw).how.classes == CLASSES[:5]


def test_labels_0_to_9_without_names_are_cifar10(write, raw: FolderStore) -> None:
    imported = import_source(write(list(range(10))), raw)
    assert imported.how.classes == CLASSES
    assert imported.assumed[0] == "labels 0 to 9 without names in the source: the classes are those of CIFAR-10"


def test_labels_without_names_are_counted_in_every_row_of_every_file(write, raw: FolderStore) -> None:
    source = write([0, 1, 2], [3, 0, 11])
    assert import_source(source, raw).how.classes == tuple(map(str, range(12)))
    again = import_source(source, raw)  # from what is stored
    assert again.how.classes == tuple(map(str, range(12)))


@pytest.mark.parametrize("labels", [[0, 1000], [0, 0]])
def test_labels_without_names_of_too_many_or_one_class_are_refused(labels: list[int], write, raw: FolderStore) -> None:
    with pytest.raises(DataError, match=f"its highest label is {max(labels)}; expected 2 to 1,000.*declare `classes`"):
        import_source(write(labels), raw)


def test_archive_without_names_is_cifar10(make, raw: FolderStore, tmp_path: Path) -> None:
    two = {"data": make.images(2).reshape(2, -1), "labels": [0, 1]}
    path = tmp_path / "a.tar.gz"
    path.write_bytes(make.tar({f"a/{batch}": pickle.dumps(two) for batch in BATCHES}))
    assert import_source(str(path), raw).how.classes == CLASSES


def test_binary_archive_of_cifar100_is_refused(make, raw: FolderStore, tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(make.tar({"cifar-100-binary/train.bin": bytes(3074)}))
    with pytest.raises(DataError, match=r"CIFAR-100's binary archive. Use its Python archive"):
        import_source(str(path), raw)


@pytest.mark.parametrize(
    ("names", "lost"),
    [
        (["bus", "car", "boat", "train"], "train/3.png"),
        (["valid", "invalid"], "valid/0.png"),
        (["cats/train", "dogs/train", "cats/test", "dogs/test"], "cats/test/2.png"),
        (["train/cat", "train/dog", "test"], "test/2.png"),
    ],
)
def test_picture_of_a_split_and_no_class_is_refused(names: list[str], lost: str, folders, raw: FolderStore) -> None:
    split = lost.split("/")[-2]
    with pytest.raises(
        DataError, match=f"{lost} is in a folder with the name of a split.*Put it into {split}/<class>/"
    ):
        import_source(folders(names), raw)


def test_class_with_the_name_of_a_split_is_refused(folders, raw: FolderStore) -> None:
    source = folders(["invalid", "valid"])
    with pytest.raises(DataError, match=r"the class valid has the name of a split. Rename it"):
        import_source(source, raw, ImageRequest(classes=("invalid", "valid")))


def test_a_single_class_is_refused(folders, raw: FolderStore) -> None:
    with pytest.raises(DataError, match=r"expected 2 to 1,000 class names.*got \('cat'\)"):
        import_source(folders(["cat", "cat/a"]), raw)


def test_classes_with_the_word_test_in_their_names(folders, raw: FolderStore) -> None:
    names = ("crash test", "test_tube")
    source = folders([f"{split}/{name}" for split in ("train", "test") for name in names])
    for wanted in (ImageRequest(), ImageRequest(classes=names)):
        imported = import_source(source, raw, wanted)
        assert imported.how.classes == names
        assert [item.split for item in imported.objects] == ["train", "test"]


def test_folders_of_splits_with_unclear_names_are_not_classes(folders, raw: FolderStore) -> None:
    source = folders([f"{split}_images/{name}" for split in ("train", "test") for name in ("cat", "dog")])
    with pytest.raises(DataError, match="not clear whether test_images/cat belongs to a test split"):
        import_source(source, raw)


def test_column_called_label_counts_before_another_one_with_names(make, raw: FolderStore, tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": make.png(image), "path": None} for image in make.images(4)]
    columns = {"img": pa.array(rows, kind), "label": np.arange(4), "source": np.arange(4) % 2}
    table = pa.table(columns).replace_schema_metadata(make.names(["web", "camera"], "source"))
    pq.write_table(table, tmp_path / "a.parquet")
    imported = import_source(str(tmp_path / "a.parquet"), raw)
    assert imported.how.classes == ("0", "1", "2", "3")
    assert labels_of(raw, imported) == [0, 1, 2, 3]
