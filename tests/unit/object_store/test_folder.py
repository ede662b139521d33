import os
from pathlib import Path
from unittest.mock import Mock

import pytest

from resources.errors import ConfigError, ObjectNotFoundError, StoreError
from resources.object_store import FolderStore
from resources.object_store.folder import write_atomically


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


def test_folder_is_not_an_object(tmp_path: Path) -> None:
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


def test_a_link_that_is_removed_leaves_what_it_links_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"1")
    store = FolderStore(tmp_path / "store")
    store.write("a", b"")
    (store.root / "link").symlink_to("../file")
    info = store.stat("link")
    assert info is not None
    assert store.delete("link", info.etag)
    assert not store.exists("link")
    assert (tmp_path / "file").read_bytes() == b"1"


def test_a_replaced_file_is_not_removed_and_comes_back_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FolderStore(tmp_path)
    store.write("x", b"judged")
    info = store.stat("x")
    assert info is not None
    rename = Path.rename

    def replace_first(path: Path, target: Path) -> Path:
        if path.name == "x":
            store.write("x", b"newer")  # after the last look at its etag
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", replace_first)
    assert not store.delete("x", info.etag)
    assert store.read("x") == b"newer"
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_that_a_killed_process_was_removing_is_still_an_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FolderStore(tmp_path)
    store.write("x.png", b"1")
    info = store.stat("x.png")
    assert info is not None
    monkeypatch.setattr(Path, "unlink", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.delete("x.png", info.etag)
    (left,) = store.list()
    assert store.read(left.key) == b"1"
    assert left.key.endswith(".png")


def test_a_file_with_the_longest_name_is_removed(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    name = "x" * 251 + ".png"
    store.write(name[:200], b"1")
    (tmp_path / name[:200]).rename(tmp_path / name)
    info = store.stat(name)
    assert info is not None
    assert store.delete(name, info.etag)
    assert list(store.list()) == []
