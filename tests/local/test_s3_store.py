"""The contract of both stores, and the errors of an S3 store for a faulty server or wrong settings."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from time import sleep

import numpy as np
import pytest
from PIL import Image

from cifar_assets.dataset.formats.images import pixel_digest
from cifar_assets.dataset.sources import synthetic
from cifar_assets.dataset.stores import Stores
from cifar_assets.dataset.versions.lineage import find_image
from cifar_assets.dataset.versions.processed import build_processed
from cifar_assets.dataset.versions.raw import build_raw_version
from cifar_assets.dataset.versions.reader import open_split
from resources.errors import ConfigError, IntegrityError, ObjectChangedError, ObjectNotFoundError, StoreError
from resources.object_store import FolderStore, ObjectStore, open_store
from resources.object_store.s3 import PART_BYTES, S3Store
from tests.fixtures.s3 import certificates_for_loopback, running_minio


@pytest.fixture(autouse=True)
def _settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Landed files count as settled at once."""
    monkeypatch.setattr("cifar_assets.dataset.landing.zone.SETTLED_SECONDS", -1.0)


KEYS = [
    "plain.txt",
    "deep/er/and deeper/x.bin",
    "caf\u00e9/\u732b.png",
    "a+b=c&d?e#f%20g.txt",
    "quote'\"(1)[2]{3}~!$,;@.txt",
    "..hidden/.keep",
]


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """An empty store rooted at a prefix."""
    if request.param == "folder":
        return FolderStore(tmp_path / "bucket" / "pre fix")
    server = request.getfixturevalue("s3_server")
    return server.store(f"{server.new_bucket()}/pre fix")


@pytest.mark.parametrize("key", KEYS)
def test_written_objects_are_read_back(key: str, store: ObjectStore, tmp_path: Path) -> None:
    assert store.stat(key) is None
    store.write(key, b"one")
    store.write(key, b"content")
    assert store.read(key) == b"content"
    with store.open(key) as file:
        assert (file.read(3), file.read()) == (b"con", b"tent")
    store.download(key, tmp_path / "new folder" / "copy")
    assert (tmp_path / "new folder" / "copy").read_bytes() == b"content"
    info = store.stat(key)
    assert info is not None
    assert (info.key, info.size) == (key, 7)
    assert [found.key for found in store.list()] == [key]
    store.copy(key, "copied/" + key)
    assert store.read("copied/" + key) == b"content"
    store.delete(key)
    assert not store.exists(key)
    store.delete(key)


@pytest.mark.parametrize("key", KEYS)
def test_uri_reopens_the_store(key: str, store: ObjectStore, request, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(store, S3Store):
        for name, value in request.getfixturevalue("s3_server").environment().items():
            monkeypatch.setenv(name, value)
    store.write(key, b"content")
    folder, _, name = key.rpartition("/")
    reopened = open_store(store.at(folder).uri() if folder else store.uri())
    assert reopened.read(name) == b"content"
    assert reopened.uri(name) == store.uri(key)


def test_a_missing_object_is_named(store: ObjectStore, tmp_path: Path) -> None:
    for call in (
        lambda: store.read("no/such"),
        lambda: store.open("no/such"),
        lambda: store.download("no/such", tmp_path / "x"),
        lambda: store.copy("no/such", "to"),
        lambda: store.read_verified("no/such", "0" * 64),
    ):
        with pytest.raises(ObjectNotFoundError, match="no/such"):
            call()
    assert list(tmp_path.glob("x*")) == []
    assert not store.exists("to")
    assert list(store.list("no/")) == []


def test_listing_is_in_key_order_by_prefix_and_complete(store: ObjectStore) -> None:
    keys = ["a.b", "a/1", "a/2/3", "ab", "b/1", "B"]
    for key in reversed(keys):
        store.write(key, key.encode())
    assert [info.key for info in store.list()] == sorted(keys)
    assert [info.key for info in store.list("a/")] == ["a/1", "a/2/3"]
    assert [info.key for info in store.list("a/2/3")] == ["a/2/3"]
    assert [info.key for info in store.at("a").list("2/")] == ["2/3"]
    assert [info.key for info in store.at("a/2").list()] == ["3"]


@pytest.mark.s3
def test_more_objects_than_one_page(s3_server) -> None:
    root = s3_server.store()
    bucket = s3_server.new_bucket()
    store = root.at(bucket).at("many")
    threads = [
        threading.Thread(target=lambda part=part: [store.write(f"{n:05d}", b"x") for n in range(part, 1105, 8)])
        for part in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    root.at(bucket).write("many-more", b"not below the prefix")
    assert [info.key for info in store.list()] == [f"{n:05d}" for n in range(1105)]
    assert [info.key for info in root.list(f"{bucket}/many-")] == [f"{bucket}/many-more"]


def test_verified_read_detects_a_change(store: ObjectStore, tmp_path: Path) -> None:
    store.write("x", b"content")
    with pytest.raises(IntegrityError, match="expected sha256 0000"):
        store.read_verified("x", "0" * 64)
    with pytest.raises(IntegrityError):
        store.download_verified("x", "0" * 64, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_replaced_object_is_neither_copied_nor_deleted(store: ObjectStore) -> None:
    store.write("x", b"judged")
    judged = store.stat("x")
    assert judged is not None
    store.write("x", b"newer")
    with pytest.raises(ObjectChangedError, match="x"):
        store.copy("x", "y", judged.etag)
    assert not store.delete("x", judged.etag)
    assert (store.read("x"), store.exists("y")) == (b"newer", False)
    now = store.stat("x")
    assert now is not None
    store.copy("x", "y", now.etag)
    assert store.delete("x", now.etag)
    assert store.delete("x", now.etag)
    assert (store.exists("x"), store.read("y")) == (False, b"newer")


def test_one_of_many_writers_creates_an_object(store: ObjectStore) -> None:
    def create(number: int) -> bytes:
        store.create("x", b"%d" % number)
        return store.read("x")

    with ThreadPoolExecutor(8) as pool:
        (created,) = set(pool.map(create, range(8)))
    assert created in {b"%d" % number for number in range(8)}


def test_touch_changes_only_the_time_stamp(store: ObjectStore) -> None:
    store.write("x", b"content")
    before = store.stat("x")
    sleep(1.1)  # S3 reports whole seconds
    store.touch("x")
    after = store.stat("x")
    assert before is not None
    assert after is not None
    assert after.last_modified > before.last_modified
    assert store.read("x") == b"content"
    with pytest.raises(ObjectNotFoundError):
        store.touch("y")


@pytest.mark.parametrize("moment", ["before the copy", "after the copy"])
def test_a_landed_object_replaced_while_it_is_rejected_is_not_lost(
    moment: str, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "TRAIN_ROWS", 100)
    monkeypatch.setattr(synthetic, "TEST_ROWS", 20)
    store.write("landing/cat/x.png", b"bad")
    copy = store.copy

    def replaced(key: str, to_key: str, etag: str | None = None) -> None:
        if moment == "before the copy":
            store.write(key, b"newer")
        copy(key, to_key, etag)
        store.write(key, b"newer")

    with monkeypatch.context() as patch:
        patch.setattr(store, "copy", replaced)
        report = build_raw_version(store, "synthetic:4").landing
    assert store.read("landing/cat/x.png") == b"newer"
    if moment == "before the copy":
        assert list(store.list("rejected/")) == []
        assert "replaced while it was being checked" in report.skipped["landing/cat/x.png"]
    else:
        assert b"bad" in [store.read(info.key) for info in store.list("rejected/cat/x-")]
    build_raw_version(store, "synthetic:4")
    found = {store.read(info.key) for info in store.list("rejected/") if info.key.endswith(".png")}
    assert found == ({b"newer"} if moment == "before the copy" else {b"bad", b"newer"})
    assert list(store.list("landing/")) == []


def test_keys_outside_the_root_are_rejected(store: ObjectStore) -> None:
    for key in ("../x", "a/../../x", "/../x"):
        with pytest.raises(ConfigError, match="root"):
            store.write(key, b"x")


def test_etag_changes_when_an_object_is_replaced(store: ObjectStore) -> None:
    tags = set()
    for content in (b"one", b"two"):
        store.write("x", content)
        info = store.stat("x")
        assert info is not None
        tags.add(info.etag)
        assert [found.etag for found in store.list("x")] == [info.etag]
    assert len(tags) == 2


@pytest.mark.s3
def test_large_files_are_uploaded_in_parts(s3_server, tmp_path: Path) -> None:
    store = s3_server.store(s3_server.new_bucket())
    content = bytes(range(256)) * (PART_BYTES // 256 * 2 + 100)
    (tmp_path / "large").write_bytes(content)
    store.upload("large", tmp_path / "large")
    store.download("large", tmp_path / "back")
    info = store.stat("large")
    assert info is not None
    assert info.etag.endswith("-3")  # the number of parts
    assert (tmp_path / "back").read_bytes() == content


@pytest.mark.s3
def test_buckets_are_created_once(s3_server) -> None:
    root = s3_server.store()
    name = s3_server.new_bucket()
    root.ensure_buckets([name, name])
    root.at(name).write("x", b"1")
    root.ensure_buckets([name])
    assert root.read(f"{name}/x") == b"1"


@pytest.mark.s3
def test_wrong_settings_say_what_to_do(s3_server) -> None:
    right = s3_server.connection()
    bucket = s3_server.new_bucket()
    cases = [
        (replace(right, access_key="nobody"), bucket, "AWS_ACCESS_KEY_ID is not known"),
        (replace(right, secret_key="wrong"), bucket, "AWS_SECRET_ACCESS_KEY"),
        (right, "no-such-bucket", "bucket does not exist"),
    ]
    for connection, name, advice in cases:
        store = S3Store(connection, name)
        for call in (lambda s=store: s.read("x"), lambda s=store: s.write("x", b"1"), lambda s=store: list(s.list())):
            with pytest.raises(StoreError, match=advice) as caught:
                call()
            assert name in str(caught.value)


@pytest.mark.s3
def test_tls_with_a_custom_certificate_authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificates = certificates_for_loopback(tmp_path / "certs")
    with running_minio(tmp_path, certificates) as server:
        with pytest.raises(StoreError, match="AWS_CA_BUNDLE"):
            server.store().ensure_buckets(["secure"])
        plain = replace(server, endpoint=server.endpoint.replace("https:", "http:")).store()
        with pytest.raises(StoreError, match="use https:// in AWS_ENDPOINT_URL"):
            plain.ensure_buckets(["secure"])
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificates / "public.crt"))
        store = server.store()
        store.ensure_buckets(["secure"])
        store.write("secure/x", b"content")
        assert store.read("secure/x") == b"content"


@pytest.mark.s3
def test_a_dataset_in_s3_is_the_one_in_a_folder(s3_server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "TRAIN_ROWS", 300)
    monkeypatch.setattr(synthetic, "TEST_ROWS", 50)
    images, _ = synthetic.draw_split(9, "train", 20)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(images[0].transpose(1, 2, 0))).save(buffer, "PNG")
    results = []
    bucket = s3_server.new_bucket()
    for root in (FolderStore(tmp_path / "store"), s3_server.store(bucket)):
        raw, processed = root.at("raw-data"), root.at("processed-data")
        raw.write("landing/cat/new.png", buffer.getvalue())
        raw.write("landing/dog/bad.png", b"bad")
        version = build_raw_version(raw, "synthetic:4")
        built = build_processed(raw, processed, version.digest)
        again = build_processed(raw, processed, build_raw_version(raw, "synthetic:4").digest)
        assert again.reused
        reader = open_split(processed, built.digest, "train", tmp_path / "cache")
        results.append((version.digest, built.digest, reader.images.tobytes(), reader.labels.tolist()))
        assert len(list(raw.list("rejected/dog/bad-"))) == 2
        assert not raw.exists("landing/dog/bad.png")
        uses = find_image(Stores(raw, processed, root.at("models")), pixel_digest(images[0]))
        assert [use.processed_digest for use in uses] == [built.digest]
    assert results[0] == results[1]
    # A bucket can be the source of another store.
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    upload = s3_server.store(bucket).at("upload")
    for number in range(10):
        for split in ("train", "test"):
            noise = np.random.RandomState(number + 100 * (split == "test")).randint(0, 256, (32, 32, 3))
            buffer = io.BytesIO()
            Image.fromarray(noise.astype(np.uint8)).save(buffer, "PNG")
            upload.write(f"{split}/{('ship', 'truck')[number % 2]}/{number}.png", buffer.getvalue())
    version = build_raw_version(FolderStore(tmp_path / "other"), f"s3://{bucket}/upload")
    assert [(item.split, item.rows) for item in version.manifest.objects] == [("train", 10), ("test", 10)]
