"""Files that someone is still writing into the landing folder are left alone (case C04)."""

import gzip
import io
import os
import tarfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cifar_assets.dataset.landing.zone import SETTLED_SECONDS, Budget, scan_landing
from resources.object_store import FolderStore


def parquet() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"label": list(range(100))}), buffer)
    return buffer.getvalue()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("data_batch_1")
        info.size = 20_480
        archive.addfile(info, io.BytesIO(b"\1" * 20_480))
    return buffer.getvalue()[: 512 + 20_480 + 1024]  # header, data, end mark; the padding after it says nothing


def picture(format_name: str) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format_name)
    return buffer.getvalue()


WHOLE = {
    "rows.parquet": parquet(),
    "batch.tar.gz": gzip.compress(bytes(range(256)) * 64),
    "batch.tar": tar(),
    "cat/one.png": picture("PNG"),
    "cat/one.jpg": picture("JPEG"),
}


def put(raw: FolderStore, name: str, data: bytes, age_seconds: float = 0) -> Path:
    """Like `cp` in progress: no rename at the end."""
    path = raw.root / "landing" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    then = datetime.now(UTC).timestamp() - age_seconds
    os.utime(path, (then, then))
    return path


@pytest.fixture
def raw(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_file_that_grows_waits_until_it_is_whole(raw: FolderStore, name: str, share: float) -> None:
    data = WHOLE[name]
    put(raw, name, data[: int(len(data) * share)])
    scan = scan_landing(raw)
    assert scan.ready == ()
    assert scan.skipped == {f"landing/{name}": "still being written"}
    put(raw, name, data)
    assert [info.key for info in scan_landing(raw).ready] == [f"landing/{name}"]


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_that_stays_broken_is_left_to_validation(raw: FolderStore, name: str) -> None:
    put(raw, name, WHOLE[name][:60], age_seconds=SETTLED_SECONDS + 5)
    assert [info.key for info in scan_landing(raw).ready] == [f"landing/{name}"]


def test_a_picture_too_large_to_be_used_is_left_to_validation_unread(raw: FolderStore) -> None:
    with put(raw, "cat/huge.png", picture("PNG")).open("r+b") as file:
        file.truncate(1 << 40)  # sparse; reading it would take all memory
    assert [info.key for info in scan_landing(raw).ready] == ["landing/cat/huge.png"]


def test_a_file_that_may_not_be_read_waits_and_says_so(raw: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    put(raw, "cat/one.png", picture("PNG"), age_seconds=SETTLED_SECONDS + 5)
    monkeypatch.setattr("cifar_assets.dataset.landing.zone.os.access", lambda path, mode: False)
    scan = scan_landing(raw)
    assert scan.ready == ()
    assert "permission" in scan.skipped["landing/cat/one.png"]


def test_links_are_followed_and_one_to_nothing_is_left_alone(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.png"
    elsewhere.write_bytes(picture("PNG"))
    store = FolderStore(tmp_path / "store")
    folder = store.root / "landing" / "cat"
    folder.mkdir(parents=True)
    (folder / "linked.png").symlink_to(elsewhere)
    (folder / "dangling.png").symlink_to(tmp_path / "nothing.png")
    (folder / "itself.png").symlink_to(folder / "itself.png")
    (folder / "through a file.png").symlink_to(elsewhere / "no folder")
    scan = scan_landing(store)
    assert [info.key for info in scan.ready] == ["landing/cat/linked.png"]
    assert scan.skipped == {
        f"landing/cat/{name}.png": "a link that leads nowhere" for name in ("dangling", "itself", "through a file")
    }
    store.delete("landing/cat/linked.png")
    assert elsewhere.exists()


def test_class_folder_that_is_a_link_is_named(raw: FolderStore, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    put(raw, "cat/one.png", picture("PNG"))
    (raw.root / "landing" / "dog").symlink_to(tmp_path / "elsewhere")
    assert scan_landing(raw).skipped == {"landing/dog": "a link to a folder: copy the folder, or link its files"}


def test_name_that_is_not_utf8_is_named(raw: FolderStore) -> None:
    path = put(raw, "cat/one.png", picture("PNG"))
    os.rename(path, os.fsencode(path.parent) + b"/\xff.png")
    scan = scan_landing(raw)
    assert scan.ready == ()
    assert scan.skipped == {"landing/cat/\\udcff.png": "its name is not UTF-8"}


def test_one_look_unpacks_no_more_than_its_budget(raw: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gzip.compress(bytes(3 << 20))
    for number in range(5):
        put(raw, f"{number}.tar.gz", whole)
    monkeypatch.setattr(Budget, "__init__", lambda self: setattr(self, "num_bytes", 8 << 20))
    scan = scan_landing(raw)
    assert len(scan.ready) == 2
    assert set(scan.skipped.values()) == {"still being written"}
    for number in range(5):
        put(raw, f"{number}.tar.gz", whole, age_seconds=SETTLED_SECONDS + 5)
    assert len(scan_landing(raw).ready) == 5


def test_nothing_is_decoded_by_a_look(raw: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.Image.open", fail)
    put(raw, "cat/one.png", WHOLE["cat/one.png"])
    put(raw, "cat/one.jpg", WHOLE["cat/one.jpg"])
    assert len(scan_landing(raw).ready) == 2
