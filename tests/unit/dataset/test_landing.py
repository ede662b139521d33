"""Landed data is joined, rejected with a reason, or left in place."""

import io
import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cifar_assets.contracts import CLASSES
from cifar_assets.dataset.formats.images import pixel_digest
from cifar_assets.dataset.landing import join, rejection
from cifar_assets.dataset.landing.zone import classify_landing_object, fingerprint, scan_landing
from cifar_assets.dataset.versions.processed import build_processed
from cifar_assets.dataset.versions.raw import RawVersion, build_raw_version, make_current, read_raw
from cifar_assets.dataset.versions.reader import open_split
from resources.errors import DataError
from resources.object_store import FolderStore
from tests.unit.dataset.rejections import read_rejected, reason_of, rejected_keys


def parquet_of(columns: list[tuple[str, list]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([pa.array(rows) for _, rows in columns], [name for name, _ in columns]), buffer)
    return buffer.getvalue()


def landing_keys(raw: FolderStore) -> list[str]:
    return [info.key for info in raw.list("landing/")]


def test_good_rows_join_and_bad_rows_are_rejected_with_reasons(make, raw: FolderStore, source: str) -> None:
    good = [make.png(image) for image in make.images(500, 5)]
    encoded = [*good, *[b"no image"] * 10, *[make.png(image) for image in make.images(9, 6)], None]
    labels = [*make.labels(500), *[1] * 10, *[10] * 4, *[-1] * 4, None, 3]
    data = make.encoded_parquet(encoded, labels)
    raw.write("landing/week 1.parquet", data)
    version = build_raw_version(raw, source)
    assert version.manifest.rows == 80 + 500
    assert version.landing.accepted == {"landing/week 1.parquet": 500}
    assert version.landing.rejected_rows == 20
    # The object stays: it is part of the next version as well.
    assert landing_keys(raw) == ["landing/week 1.parquet"]
    reason = reason_of(raw, "week 1.parquet")
    assert reason["rejected_rows"] == 20
    assert [row["row"] for row in reason["rows"]] == list(range(500, 520))
    assert "out of range" in reason["rows"][10]["reason"]
    assert reason["rows"][19] == {"row": 519, "reason": "Expected a PNG or JPEG image, got an empty file."}
    assert build_raw_version(raw, source).digest == version.digest


@pytest.mark.parametrize("name", ["images.parquet", "deep/er/images.parquet", "caf\u00e9 #1 +50%.parquet"])
def test_digest_depends_on_content_and_not_on_names(name: str, make, raw: FolderStore, source: str) -> None:
    without = build_raw_version(raw, source).digest
    data = make.parquet(make.images(10, 5), make.labels(10))
    raw.write(f"landing/{name}", data)
    landed_once = build_raw_version(raw, source).digest
    assert landed_once != without
    raw.write("landing/copy.parquet", data)
    twice = build_raw_version(raw, source)
    assert twice.digest == landed_once
    assert sum(twice.landing.duplicates.values()) == 10
    raw.delete(f"landing/{name}")
    assert build_raw_version(raw, source).digest == landed_once
    raw.delete("landing/copy.parquet")
    assert build_raw_version(raw, source).digest == without


def test_order_of_arrival_does_not_matter(make, tmp_path: Path, source: str) -> None:
    files = {f"landing/{n}.parquet": make.parquet(make.images(4, n), make.labels(4)) for n in (5, 6, 7)}
    digests = set()
    for number, names in enumerate([sorted(files), sorted(files, reverse=True)]):
        raw = FolderStore(tmp_path / f"store{number}")
        for name in names:
            raw.write(name, files[name])
            build_raw_version(raw, source)
        digests.add(build_raw_version(raw, source).digest)
    assert len(digests) == 1


def test_single_images_join_under_their_class_folder(
    make, raw: FolderStore, processed: FolderStore, source: str
) -> None:
    images = make.images(3, 5)
    raw.write("landing/cat/a.png", make.png(images[0]))
    raw.write("landing/2024/Dog/b.png", make.png(images[1]))
    raw.write("landing/cat/again.png", make.png(images[0]))
    version = build_raw_version(raw, source)
    assert version.landing.accepted == {"landing/2024/Dog/b.png": 1, "landing/cat/a.png": 1}
    assert version.landing.duplicates == {"landing/cat/again.png": 1}
    assert [(item.format, item.rows) for item in version.manifest.objects if item.role == "landed"] == [("images", 2)]
    built = build_processed(raw, processed, version.digest)
    readers = [open_split(processed, built.digest, split) for split in ("train", "validation")]
    labels = {reader.digest(i): int(reader.labels[i]) for reader in readers for i in range(len(reader))}
    assert labels[pixel_digest(images[0])] == CLASSES.index("cat")
    assert labels[pixel_digest(images[1])] == CLASSES.index("dog")


def test_a_bad_single_image_moves_to_rejected(make, raw: FolderStore, source: str) -> None:
    cut = make.png(make.images(1, 5)[0])[:500]
    raw.write("landing/cat/cut.png", cut)
    version = build_raw_version(raw, source)
    assert version.manifest.rows == 80
    assert landing_keys(raw) == []
    assert read_rejected(raw, "cat/cut.png") == cut
    assert reason_of(raw, "cat/cut.png")["object"] == "landing/cat/cut.png"
    assert version.landing.rejected[0].moved_to in rejected_keys(raw, "cat/cut.png")


def test_other_content_under_a_rejected_name_loses_nothing(raw: FolderStore, source: str) -> None:
    for data in (b"first bad one", b"second bad one"):
        raw.write("landing/cat/x.png", data)
        build_raw_version(raw, source)
    kept = {raw.read(info.key) for info in raw.list("rejected/") if info.key.endswith(".png")}
    assert kept == {b"first bad one", b"second bad one"}


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("x.parquet", b"not parquet at all"),
        ("x.tar.gz", b"not an archive"),
        ("x.tgz", b"\x1f\x8b\x08\x00cut"),
        ("text.parquet", parquet_of([("img", [{"bytes": "GIF87a", "path": "x"}]), ("label", [0])])),
        ("list.parquet", parquet_of([("img", [{"bytes": [b"GIF8"], "path": "x"}]), ("label", [0])])),
        ("two.parquet", parquet_of([("img", [{"bytes": b"x"}]), ("label", [0]), ("label", [1])])),
    ],
)
def test_an_unreadable_object_moves_to_rejected_as_a_whole(
    name: str, data: bytes, raw: FolderStore, source: str
) -> None:
    raw.write(f"landing/{name}", data)
    version = build_raw_version(raw, source)
    assert version.manifest.rows == 80
    assert landing_keys(raw) == []
    assert read_rejected(raw, name) == data
    assert len(reason_of(raw, name)["reason"]) > 20


def test_a_picture_too_large_is_refused_unread(raw: FolderStore, source: str) -> None:
    raw.write("landing/cat/huge.png", b"\x89PNG")
    with (raw.root / "landing/cat/huge.png").open("r+b") as file:
        file.truncate(64 << 20)
    tracemalloc.start()
    try:
        build_raw_version(raw, source)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert "at most" in reason_of(raw, "cat/huge.png")["reason"]


def test_the_split_of_a_picture_is_that_of_its_own_folder(make, raw: FolderStore, source: str) -> None:
    data = make.png(make.images(1, 5)[0])
    raw.write("landing/cat/b.png", data)
    raw.write("landing/test/cat/a.png", data)
    raw.write("landing/test/cat/c.png", data)
    report = build_raw_version(raw, source).landing
    assert {rejection.key for rejection in report.rejected} == {"landing/test/cat/a.png", "landing/test/cat/c.png"}
    assert report.accepted == {"landing/cat/b.png": 1}


def test_object_without_valid_rows_is_rejected_as_a_whole(make, raw: FolderStore, source: str) -> None:
    data = make.encoded_parquet([b"?", b"??"], [0, 1])
    raw.write("landing/x.parquet", data)
    build_raw_version(raw, source)
    assert landing_keys(raw) == []
    assert read_rejected(raw, "x.parquet") == data
    assert [row["row"] for row in reason_of(raw, "x.parquet")["rows"]] == [0, 1]


def build_with(make, raw: FolderStore, source: str, images: np.ndarray, labels: list[int]) -> RawVersion:
    raw.write("landing/x.parquet", make.parquet(images, labels))
    return build_raw_version(raw, source)


def test_duplicates_of_the_source_are_not_trained_twice(make, raw: FolderStore, source: str) -> None:
    before = build_raw_version(raw, source).digest
    version = build_with(make, raw, source, make.images(5), list(range(5)))
    assert version.digest == before
    assert version.landing.duplicates == {"landing/x.parquet": 5}
    assert version.landing.rejected == []


def test_a_conflict_with_the_source_is_rejected(make, raw: FolderStore, source: str) -> None:
    images = np.stack([make.images(1)[0], make.images(1, 5)[0]])
    version = build_with(make, raw, source, images, [3, 4])
    assert version.manifest.rows == 81
    (rejection,) = version.landing.rejected
    assert "labeled cat, but the source has the same pixels as airplane" in rejection.rows[0]


def test_a_test_image_never_gets_into_training(make, raw: FolderStore, source: str) -> None:
    images = np.stack([make.images(1, 1)[0], make.images(1, 5)[0]])
    version = build_with(make, raw, source, images, [0, 4])
    assert version.manifest.rows == 81
    assert "is a test image" in version.landing.rejected[0].rows[0]


def test_a_conflict_between_landed_images_rejects_all_of_them(make, raw: FolderStore, source: str) -> None:
    images = make.images(3, 5)
    raw.write("landing/a.parquet", make.parquet(images[:2], [1, 2]))
    raw.write("landing/b.parquet", make.parquet(images[1:], [3, 4]))
    version = build_raw_version(raw, source)
    assert version.manifest.rows == 82
    assert sorted(rejection.key for rejection in version.landing.rejected) == [
        "landing/a.parquet",
        "landing/b.parquet",
    ]


def test_the_same_pixels_in_another_file_are_a_duplicate(make, raw: FolderStore, source: str) -> None:
    image = make.images(1, 5)[0]
    raw.write("landing/frog/a.png", make.png(image))
    raw.write("landing/frog/b.png", make.png(image, compress_level=0))
    version = build_raw_version(raw, source)
    assert version.manifest.rows == 81


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "WEBP"])
def test_landed_picture_of_a_refused_format_is_rejected_by_name(kind, make, raw: FolderStore, source: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(make.images(1, 5)[0].transpose(1, 2, 0).copy()).save(buffer, kind)
    raw.write(f"landing/frog/a.{kind.lower()}", buffer.getvalue())
    (rejection,) = build_raw_version(raw, source).landing.rejected
    assert rejection.moved_to in rejected_keys(raw, f"frog/a.{kind.lower()}")
    assert rejection.reason.lower().startswith(f"expected a png or jpeg image, got a {kind.lower()} image")


@pytest.mark.parametrize(
    "name", ["50%25off", "a b", "a+b", "a#b", "a?b", "caf\u00e9", "cafe\u0301", "%2e%2e", "a&b=c", "-", "'"]
)
def test_landed_names_stay_as_they_are(name: str, make, raw: FolderStore, source: str) -> None:
    raw.write(f"landing/{name}/cat/good.png", make.png(make.images(1, 5)[0]))
    raw.write(f"landing/cat/{name}.png", b"bad")
    report = build_raw_version(raw, source).landing
    assert report.accepted == {f"landing/{name}/cat/good.png": 1}
    assert read_rejected(raw, f"cat/{name}.png") == b"bad"


def test_landed_object_larger_than_the_disk_stops_no_build(
    make, raw: FolderStore, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw.write("landing/a.parquet", make.parquet(make.images(2, 5), [0, 1]))
    usage = shutil.disk_usage("/")
    monkeypatch.setattr("cifar_assets.dataset.landing.join.shutil.disk_usage", lambda path: usage._replace(free=100))
    version = build_raw_version(raw, source)
    assert version.manifest.rows == 80
    assert "room for 100: set TMPDIR" in version.landing.skipped["landing/a.parquet"]
    assert version.landing.unread == 1


@pytest.mark.parametrize("name", ["x" * 240, "\u00e9" * 110, "x" * 249])
def test_long_name_is_rejected_under_a_shorter_one(name: str, raw: FolderStore, source: str) -> None:
    raw.write(f"landing/cat/{name}.png", b"bad")
    (rejection,) = build_raw_version(raw, source).landing.rejected
    assert rejection.moved_to is not None
    assert raw.read(rejection.moved_to) == b"bad"
    assert json.loads(raw.read(f"{rejection.moved_to}.reason.json"))["object"] == f"landing/cat/{name}.png"
    assert landing_keys(raw) == []


def test_landed_test_data_is_rejected(make, raw: FolderStore, source: str) -> None:
    raw.write("landing/test/cat/a.png", make.png(make.images(1, 5)[0]))
    raw.write("landing/test-00000.parquet", make.parquet(make.images(2, 6), [0, 1]))
    version = build_raw_version(raw, source)
    assert version.manifest.rows == 80
    assert all("test split" in rejection.reason for rejection in version.landing.rejected)


def test_a_landed_archive_adds_its_training_rows_only(make, raw: FolderStore, source: str) -> None:
    raw.write("landing/more.tar.gz", make.archive(8))
    version = build_raw_version(raw, source)
    assert version.manifest.rows == 80 + 100
    assert version.landing.rejected_rows == 20
    raw.write("landing/more.tgz", make.archive(8))
    raw.delete("landing/more.tar.gz")
    assert build_raw_version(raw, source).digest == version.digest


@pytest.mark.parametrize("resize", [True, False])
def test_image_of_another_size_is_scaled_or_rejected(resize: bool, make, raw: FolderStore, source: str) -> None:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (10, 200, 30)).save(buffer, "PNG")
    raw.write("landing/frog/big.png", buffer.getvalue())
    version = build_raw_version(raw, source, resize=resize)
    assert version.manifest.rows == (81 if resize else 80)
    assert landing_keys(raw) == (["landing/frog/big.png"] if resize else [])


def test_unchanged_objects_are_not_read_again(make, raw: FolderStore, source: str, monkeypatch) -> None:
    raw.write("landing/a.parquet", make.parquet(make.images(10, 5), make.labels(10)))
    raw.write("landing/cat/b.png", make.png(make.images(1, 6)[0]))
    first = build_raw_version(raw, source)

    def fail(*arguments: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(join, "_read", fail)
    assert build_raw_version(raw, source).digest == first.digest


def test_an_object_replaced_under_its_name_is_read_again(make, raw: FolderStore, source: str) -> None:
    raw.write("landing/a.parquet", make.parquet(make.images(10, 5), make.labels(10)))
    first = build_raw_version(raw, source)
    raw.write("landing/a.parquet", make.parquet(make.images(11, 7), make.labels(11)))
    second = build_raw_version(raw, source)
    assert (first.manifest.rows, second.manifest.rows) == (90, 91)


def test_an_object_that_changes_while_it_is_read_waits(make, raw: FolderStore, source: str, monkeypatch) -> None:
    raw.write("landing/a.parquet", b"half of it")
    download = raw.download

    def download_and_grow(key: str, path: Path) -> None:
        download(key, path)
        raw.write("landing/a.parquet", make.parquet(make.images(10, 5), make.labels(10)))

    with monkeypatch.context() as patch:
        patch.setattr(raw, "download", download_and_grow)
        version = build_raw_version(raw, source)
    assert "changed while it was being read" in version.landing.skipped["landing/a.parquet"]
    assert build_raw_version(raw, source).manifest.rows == 90


NOT_DATA = {
    "landing/": 0,
    "landing/nested/": 0,
    "landing/.keep": 0,
    "landing/cat/.keep": 0,
    "landing/.DS_Store": 6148,
    "landing/.git/x.parquet": 10,
    "landing/._a.parquet": 4096,
    "landing/x.tar.gz": 0,
    "landing/cat/x.png": 0,
    "landing/notes.txt": 12,
    "landing/x.tar.gz.part": 100,
    "landing/x.parquet.tmp": 100,
    "landing/x.parquet~": 100,
    "landing/x.parquet.crdownload": 100,
    "landing/parquet": 100,
    "landing/cat.png": 100,
    "landing/cat": 5,
    "landing/x.zip": 100,
}


@pytest.mark.parametrize(("key", "size"), NOT_DATA.items())
def test_objects_that_are_not_data_are_skipped_with_a_reason(key: str, size: int) -> None:
    reason = classify_landing_object(key, size)
    assert reason is not None
    assert len(reason) > 5


@pytest.mark.parametrize(
    "key",
    [
        "landing/x.parquet",
        "landing/X.TAR.GZ",
        "landing/a b/x.tgz",
        "landing/x.tar",
        "landing/cat/x.JPEG",
        "landing/a/dog/b/x.png",
    ],
)
def test_data_is_not_skipped(key: str) -> None:
    assert classify_landing_object(key, 10) is None


def test_image_of_a_class_that_the_dataset_does_not_have_stays(make, raw: FolderStore, source: str) -> None:
    before = build_raw_version(raw, source).digest
    raw.write("landing/elephant/x.png", make.png(make.images(1, 5)[0]))
    version = build_raw_version(raw, source)
    assert version.digest == before
    reason = version.landing.skipped["landing/elephant/x.png"]
    assert "a class that the dataset does not have: put it under landing/<class>/, class one of air" in reason
    assert version.landing.rejected == []
    assert landing_keys(raw) == ["landing/elephant/x.png"]
    (info,) = scan_landing(raw).ready
    assert version.landing.record.read == {fingerprint(info)}  # the sensor starts no further run for it


def test_landed_file_of_other_classes_is_rejected(make, raw: FolderStore, source: str) -> None:
    build_raw_version(raw, source)
    table = make.encoded_parquet([make.png(make.images(1, 5)[0])], [0], make.names(["tulip", *CLASSES[1:]]))
    raw.write("landing/x.parquet", table)
    (rejection,) = build_raw_version(raw, source).landing.rejected
    assert "declares the classes ('tulip', " in rejection.reason


def test_objects_that_are_not_data_are_left_alone(make, raw: FolderStore, source: str) -> None:
    before = build_raw_version(raw, source).digest
    for key, size in NOT_DATA.items():
        if not key.endswith("/") and key not in ("landing/cat",):
            raw.write(key, bytes(size))
    listed = landing_keys(raw)
    scan = scan_landing(raw)
    assert scan.ready == ()
    assert sorted(scan.skipped) == listed
    version = build_raw_version(raw, source)
    assert version.digest == before
    assert version.landing.skipped == scan.skipped
    assert landing_keys(raw) == listed
    raw.write("landing/complete.tar.gz", make.archive(8))
    assert [info.key for info in scan_landing(raw).ready] == ["landing/complete.tar.gz"]
    assert build_raw_version(raw, source).manifest.rows == 180


def test_an_earlier_version_is_made_current_by_its_digest(make, raw: FolderStore, source: str) -> None:
    first = build_raw_version(raw, source)
    raw.write("landing/a.parquet", make.parquet(make.images(10, 5), make.labels(10)))
    second = build_raw_version(raw, source)
    undone = build_raw_version(raw, source, digest=first.digest)
    assert (undone.digest, undone.manifest) == (first.digest, first.manifest)
    raw.delete(second.manifest.objects[-1].key)
    with pytest.raises(DataError, match="is missing"):
        make_current(raw, second.digest)
    # Landed data is still there: the next build brings the later version back.
    assert build_raw_version(raw, source).digest == second.digest
    assert read_raw(raw, second.digest) == second.manifest


def test_object_moved_by_another_build_is_not_an_error(raw: FolderStore, source: str, monkeypatch) -> None:
    raw.write("landing/cat/x.png", b"bad")
    move = rejection.reject_object

    def move_twice(store: FolderStore, *arguments, **options):
        move(store, *arguments, **options)
        return move(store, *arguments, **options)

    monkeypatch.setattr("cifar_assets.dataset.landing.join.reject_object", move_twice)
    version = build_raw_version(raw, source)
    assert version.landing.rejected[0].moved_to in rejected_keys(raw, "cat/x.png")
    assert read_rejected(raw, "cat/x.png") == b"bad"


def test_rows_beyond_the_listed_ones_have_a_reason(raw: FolderStore) -> None:
    rows = {row: "dark" for row in range(1500) if row != 1200} | {1499: "blurred"}
    rejection.reject_rows(raw, "landing/x.parquet", "a" * 64, 2000, rows)
    reason = reason_of(raw, "x.parquet")
    assert len(reason["rows"]) == 1000
    assert reason["further_rows"] == [
        {"rows": "1000-1199, 1201-1498", "reason": "dark"},
        {"rows": "1499", "reason": "blurred"},
    ]
