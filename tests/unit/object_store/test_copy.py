"""Copying between stores: what is copied, what is kept, and which differences are reported."""

from pathlib import Path

import pytest

from resources.errors import IntegrityError
from resources.object_store import FolderStore
from resources.object_store.copy import copy_bucket, main

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


def test_object_that_arrives_damaged_is_an_error(
    source: FolderStore, target: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "upload", lambda key, path: target.write(key, path.read_bytes()[:-1]))
    with pytest.raises(IntegrityError, match="/target/a: expected sha256 7692"):
        copy_bucket(source, target)


def test_settings_of_the_source_are_named_with_their_prefix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([]) == 1
    assert "with SOURCE_ before each name: " in capsys.readouterr().err
    for prefix in ("SOURCE_", ""):
        for name, value in {"ENDPOINT_URL": "http://h:1", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}.items():
            monkeypatch.setenv(f"{prefix}AWS_{name}", value)
    assert main([]) == 1
    assert "expected two servers" in capsys.readouterr().err
