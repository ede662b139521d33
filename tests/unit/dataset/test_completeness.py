"""Files that someone is still writing into the landing folder are left alone."""

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cifar_assets.dataset.landing import zone
from cifar_assets.dataset.landing.zone import scan_landing
from resources.object_store import FolderStore


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


@pytest.mark.parametrize("name", ["rows.parquet", "batch.tar.gz", "cat/one.png"])
def test_file_being_written_is_not_used_until_it_is_complete(
    raw: FolderStore, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zone, "SETTLED_SECONDS", 60.0)
    put(raw, name, b"some bytes")
    scan = scan_landing(raw)
    assert scan.ready == ()
    assert scan.skipped == {f"landing/{name}": "waiting until it has not been modified for 60 seconds"}
    put(raw, name, b"some bytes and more", age_seconds=65)
    assert [info.key for info in scan_landing(raw).ready] == [f"landing/{name}"]


def test_listing_opens_no_files(raw: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise AssertionError("opened")

    put(raw, "batch.tar.gz", b"some bytes")
    put(raw, "cat/one.png", b"some bytes")
    monkeypatch.setattr(Path, "open", fail)
    assert len(scan_landing(raw).ready) == 2


def test_unreadable_file_is_reported_and_left(raw: FolderStore, monkeypatch: pytest.MonkeyPatch) -> None:
    put(raw, "cat/one.png", b"bytes")
    monkeypatch.setattr("cifar_assets.dataset.landing.zone.os.access", lambda path, mode: False)
    scan = scan_landing(raw)
    assert scan.ready == ()
    assert "permission" in scan.skipped["landing/cat/one.png"]


def test_links_are_followed_and_broken_ones_are_skipped(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.png"
    elsewhere.write_bytes(b"bytes")
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
        f"landing/cat/{name}.png": "a broken link" for name in ("dangling", "itself", "through a file")
    }
    store.delete("landing/cat/linked.png")
    assert elsewhere.exists()


def test_class_folder_that_is_a_link_is_named(raw: FolderStore, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    put(raw, "cat/one.png", b"bytes")
    (raw.root / "landing" / "dog").symlink_to(tmp_path / "elsewhere")
    assert scan_landing(raw).skipped == {"landing/dog": "a link to a folder: copy the folder, or link its files"}


def test_name_that_is_not_utf8_is_named(raw: FolderStore) -> None:
    path = put(raw, "cat/one.png", b"bytes")
    os.rename(path, os.fsencode(path.parent) + b"/\xff.png")
    scan = scan_landing(raw)
    assert scan.ready == ()
    assert scan.skipped == {"landing/cat/\\udcff.png": "its name is not UTF-8"}
