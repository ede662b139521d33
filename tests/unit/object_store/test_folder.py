import os
from pathlib import Path

import pytest

from cifar_assets.errors import ConfigError, ObjectNotFoundError, StoreError
from cifar_assets.object_store import FolderStore
from cifar_assets.object_store.folder import write_atomically


def test_a_failed_write_leaves_the_old_object_and_nothing_else(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.write("x", b"old")

    def fail_halfway(file) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "x", fail_halfway)
    assert store.read("x") == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_being_written_is_not_listed(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    listed: list[str] = []

    def look(file) -> None:
        file.write(b"half")
        file.flush()
        listed.extend(info.key for info in store.list())

    write_atomically(tmp_path / "x", look)
    assert listed == []
    assert [info.key for info in store.list()] == ["x"]


def test_a_folder_is_no_object(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.write("a/b", b"x")
    assert store.stat("a") is None
    with pytest.raises(ObjectNotFoundError):
        store.read("a")
    with pytest.raises(ObjectNotFoundError):
        store.read("a/b/c")


def test_a_file_in_the_way_is_a_store_error(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.write("a", b"x")
    with pytest.raises(StoreError, match="Could not write"):
        store.write("a/b", b"y")
    assert store.read("a") == b"x"


def test_a_written_object_can_be_read_by_others(tmp_path: Path) -> None:
    FolderStore(tmp_path).write("x", b"1")
    assert (tmp_path / "x").stat().st_mode & 0o044 == 0o044


@pytest.mark.parametrize("key", ["", "landing/", "a/b/"])
def test_a_folder_marker_is_refused_before_it_blocks_the_folder(key: str, tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    with pytest.raises(ConfigError, match="names a folder"):
        store.write(key, b"")
    store.write(f"{key}x", b"1")
    assert store.read(f"{key}x") == b"1"
