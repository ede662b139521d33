import json

import pytest

from cifar_assets.dataset.versions.raw import (
    build_raw_version,
    current_raw_digest,
    list_raw_versions,
    make_current,
    read_raw,
)
from resources.digests import sha256_bytes
from resources.errors import ConfigError, DataError, IntegrityError, ObjectNotFoundError
from resources.object_store import FolderStore


def test_the_digest_is_of_the_manifest_and_free_of_names_and_times(
    make, raw: FolderStore, source: str, tmp_path
) -> None:
    version = build_raw_version(raw, source)
    stored = raw.read(f"versions/{version.digest}/manifest.json")
    assert sha256_bytes(stored) == version.digest
    moved = make.parquet_source(tmp_path / "elsewhere")
    assert build_raw_version(FolderStore(tmp_path / "other"), str(moved)).digest == version.digest
    assert "source" not in json.loads(stored)
    assert all(sha256_bytes(raw.read(item.key)) == item.sha256 for item in version.manifest.objects)


class Interrupted(FolderStore):
    """A store whose writes fail after a given number."""

    left = 0

    def write(self, key: str, data: bytes) -> None:
        self._spend()
        super().write(key, data)

    def upload(self, key: str, path) -> None:
        self._spend()
        super().upload(key, path)

    def _spend(self) -> None:
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1


def test_interrupted_build_leaves_no_partial_version(make, source: str, tmp_path) -> None:
    whole = FolderStore(tmp_path / "whole")
    expected = build_raw_version(whole, source).digest
    for writes in range(30):
        raw = Interrupted(tmp_path / f"store{writes}")
        raw.left = writes
        try:
            digest = build_raw_version(raw, source).digest
        except KeyboardInterrupt:
            for digest in list_raw_versions(raw):
                make_current(FolderStore(raw.root), digest)
                assert digest == expected
            raw.left = 100
            assert build_raw_version(raw, source).digest == expected
        else:
            assert digest == expected
            assert writes > 4
            return
    pytest.fail("the build never completed")


def test_versions_are_listed_with_the_current_one_marked(make, raw: FolderStore, source: str) -> None:
    assert current_raw_digest(raw) is None
    assert list_raw_versions(raw) == {}
    first = build_raw_version(raw, source)
    raw.write("landing/a.parquet", make.parquet(make.images(10, 5), make.labels(10)))
    second = build_raw_version(raw, source)
    listed = {digest: manifest for digest, (manifest, _) in list_raw_versions(raw).items()}
    assert {digest: (manifest.rows, manifest.landed_rows) for digest, manifest in listed.items()} == {
        first.digest: (80, 0),
        second.digest: (90, 10),
    }
    assert current_raw_digest(raw) == second.digest


def test_a_changed_manifest_is_noticed(raw: FolderStore, source: str, caplog: pytest.LogCaptureFixture) -> None:
    digest = build_raw_version(raw, source).digest
    key = f"versions/{digest}/manifest.json"
    raw.write(key, raw.read(key).replace(b'"rows":60', b'"rows":61'))
    with pytest.raises(IntegrityError):
        read_raw(raw, digest)
    assert list_raw_versions(raw) == {}
    assert key in caplog.text


def test_unknown_and_malformed_digests_have_different_errors(raw: FolderStore) -> None:
    with pytest.raises(ObjectNotFoundError, match="dataset versions"):
        read_raw(raw, "0" * 64)
    for bad in ("latest", "../../x", "", "0" * 63):
        with pytest.raises(ConfigError, match="not a version digest"):
            read_raw(raw, bad)
    raw.write("current.json", b"{}")
    with pytest.raises(DataError, match="not a pointer"):
        current_raw_digest(raw)
