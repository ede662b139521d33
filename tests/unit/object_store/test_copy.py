"""Copying between stores: what is copied, what is kept, and which differences are reported."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from resources.errors import ConfigError, ExplainedError, StoreError
from resources.object_store import FolderStore, ObjectInfo
from resources.object_store.copy import copy_bucket, main
from resources.object_store.s3_settings import S3Connection

OBJECTS = {"a": b"one", "b/c": b"two", "b/empty": b""}


@pytest.fixture
def source(tmp_path: Path) -> FolderStore:
    store = FolderStore(tmp_path / "source")
    for key, data in OBJECTS.items():
        store.write(key, data)
    return store


@pytest.fixture
def target(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "target")


@pytest.fixture
def two_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    for prefix, host in (("SOURCE_", "source"), ("", "target")):
        for name, value in {"ENDPOINT_URL": f"http://{host}:1", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
            monkeypatch.setenv(f"{prefix}AWS_{name}", value)


def content(store: FolderStore) -> dict[str, bytes]:
    return {info.key: store.read(info.key) for info in store.list()}


def test_second_run_continues_an_interrupted_one_and_verifies_what_is_there(
    source: FolderStore, target: FolderStore
) -> None:
    target.write("a", b"one")
    assert copy_bucket(source, target) == ({"there": 1, "copied": 2}, [])
    written = {info.key: info.last_modified for info in target.list()}
    assert copy_bucket(source, target) == ({"there": 3}, [])
    assert content(target) == content(source) == OBJECTS
    assert {info.key: info.last_modified for info in target.list()} == written


@pytest.mark.parametrize("other", [b"eno", b"longer"])
def test_other_content_is_reported_and_replaced_only_on_request(
    other: bytes, source: FolderStore, target: FolderStore
) -> None:
    target.write("a", other)
    outcomes, faults = copy_bucket(source, target)
    assert outcomes == {"different": 1, "copied": 2}
    assert faults == [f"{target.uri('a')} has other content"]
    assert target.read("a") == other
    assert copy_bucket(source, target, overwrite=True) == ({"copied": 1, "there": 2}, [])
    assert target.read("a") == b"one"


def test_object_that_is_only_at_the_target_is_reported_and_kept(source: FolderStore, target: FolderStore) -> None:
    target.write("extra", b"kept")
    assert copy_bucket(source, target) == ({"copied": 3}, [f"{target.uri('extra')} is only there"])
    assert target.read("extra") == b"kept"


def test_change_during_the_copy_is_reported(
    source: FolderStore, target: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = target.upload

    def meanwhile(key: str, path: Path) -> None:
        upload(key, path)
        if key == "a":
            source.write("a", b"newer")
            source.write("late", b"new")

    monkeypatch.setattr(target, "upload", meanwhile)
    _, faults = copy_bucket(source, target)
    assert faults == [f"{source.uri(key)} was changed during the copy" for key in ("a", "late")]


def test_object_that_arrives_damaged_is_reported(
    source: FolderStore, target: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "upload", lambda key, path: target.write(key, path.read_bytes()[:-1]))
    outcomes, faults = copy_bucket(source, target)
    assert outcomes == {"failed": 2, "copied": 1}
    assert f"{source.uri('a')} was not copied: {target.uri('a')}: expected sha256 7692" in faults[0]


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("Key 'a' leaves the store's root."),
        StoreError("The object is damaged.", transient=False),
        StoreError("No response: the object is damaged.", transient=True),
    ],
)
def test_object_that_cannot_be_read_is_reported_and_the_others_are_copied(
    error: ExplainedError, source: FolderStore, target: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    download = source.download

    def broken(key: str, path: Path) -> None:
        if key == "a":
            raise error
        download(key, path)

    monkeypatch.setattr(source, "download", broken)
    outcomes, faults = copy_bucket(source, target)
    assert outcomes == {"failed": 1, "copied": 2}
    assert faults == [f"{source.uri('a')} was not copied: {str(error).rstrip('.')}"]
    assert content(target) == {key: data for key, data in OBJECTS.items() if key != "a"}


def test_server_that_does_not_respond_ends_the_copy(
    source: FolderStore, target: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Iterator[ObjectInfo]:
        raise StoreError("No response.", transient=True)

    monkeypatch.setattr(target, "upload", refuse)
    monkeypatch.setattr(target, "list", refuse)
    with pytest.raises(StoreError, match="No response"):
        copy_bucket(source, target)


def test_fault_in_one_bucket_does_not_stop_the_later_ones(
    two_servers: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Buckets(FolderStore):
        def __init__(self, connection: S3Connection):
            super().__init__(tmp_path / connection.host)

        def ensure_buckets(self, names: Iterable[str]) -> None:
            pass

    for name in ("one", "two"):
        FolderStore(tmp_path / "source:1" / name).write("x", b"1")
    FolderStore(tmp_path / "target:1" / "one").write("x", b"2")
    monkeypatch.setattr(FolderStore, "upload", _without_space)
    monkeypatch.setattr("resources.object_store.copy.S3Store", Buckets)
    assert main(["one", "two", "--overwrite"]) == 1
    shown = capsys.readouterr()
    assert shown.out.count("1 objects, 0 copied, 0 were there, 1 differences") == 2
    assert shown.err.count("/x was not copied: The disk is full.") == 2


def _without_space(store: FolderStore, key: str, path: Path) -> None:
    raise StoreError("The disk is full.")


def test_settings_of_the_source_are_named_with_their_prefix(
    two_servers: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://source:1")
    assert main([]) == 1
    assert "expected two servers" in capsys.readouterr().err
    monkeypatch.delenv("SOURCE_AWS_ENDPOINT_URL")
    assert main([]) == 1
    assert "with SOURCE_ before each name: " in capsys.readouterr().err


@pytest.mark.parametrize("name", ["AWS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_certificate_authority_of_only_the_source_is_refused(
    name: str, two_servers: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(f"SOURCE_{name}", "/source.crt")
    assert main([]) == 1
    assert f"SOURCE_{name} is not supported: AWS_CA_BUNDLE holds for both servers" in capsys.readouterr().err
