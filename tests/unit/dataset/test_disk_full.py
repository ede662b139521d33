"""A full disk while data is downloaded, read and stored."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cifar_assets.dataset.versions.raw import build_raw_version, current_raw_digest
from resources.errors import StoreError
from resources.object_store import FolderStore
from tests.unit.dataset.rejections import read_rejected
from tests.unit.dataset.test_broken_downloads import Server, server

__all__ = ["server"]
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs takes root")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"no tmpfs can be mounted: {mount.stderr}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def grow(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=32m", disk], check=True)


def fill(disk: Path, left: int) -> None:
    disk.joinpath("filler").write_bytes(bytes(shutil.disk_usage(disk).free - left))


def test_full_disk_of_downloads_is_one_error(
    disk: Path, make, raw: FolderStore, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.body = make.parquet(make.images(600), make.labels(600))
    url = server.url.rpartition("/")[0] + "/a.parquet"
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    with pytest.raises(StoreError, match=f"No space left on device for {disk}"):
        build_raw_version(raw, url)
    assert [*raw.list(), *disk.iterdir()] == []
    assert server.requests == [None]  # not tried again: the network is fine
    grow(disk)
    assert build_raw_version(raw, url).manifest.rows == 600


def test_full_disk_of_temporary_files_publishes_nothing(
    disk: Path, make, raw: FolderStore, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = build_raw_version(raw, source).digest
    folder = tmp_path / "pictures"
    for number, image in enumerate(make.images(400, 7)):
        (folder / ("cat", "dog")[number % 2]).mkdir(parents=True, exist_ok=True)
        (folder / ("cat", "dog")[number % 2] / f"{number}.png").write_bytes(make.png(image))
    before = {info.key: info.etag for info in raw.list()}
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    with pytest.raises(StoreError, match=f"No space left on device for {disk}"):
        build_raw_version(raw, str(folder))
    assert {info.key: info.etag for info in raw.list()} == before
    assert current_raw_digest(raw) == good
    assert list(disk.iterdir()) == []
    grow(disk)
    assert build_raw_version(raw, str(folder)).manifest.rows == 400


@pytest.mark.parametrize("left", [0, 4096, 100_000, 600_000])
def test_full_disk_of_the_store_loses_nothing_that_landed(left: int, disk: Path, make, source: str) -> None:
    raw = FolderStore(disk / "store")
    landed = {"landing/cat/bad.png": b"bad", "landing/a.parquet": make.parquet(make.images(40, 5), make.labels(40))}
    for key, data in landed.items():
        raw.write(key, data)
    fill(disk, left)
    with pytest.raises(StoreError, match=f"Check free space|No space left on device for {disk}"):
        build_raw_version(raw, source)
    for key, data in landed.items():
        assert data == (raw.read(key) if raw.exists(key) else read_rejected(raw, key.removeprefix("landing/")))
    assert current_raw_digest(raw) is None
    assert list(disk.rglob(".writing-*")) == []
    grow(disk)
    version = build_raw_version(raw, source)
    assert version.manifest.rows == 120
    assert read_rejected(raw, "cat/bad.png") == b"bad"
