"""What S3 servers do that the object store relies on: on MinIO, SeaweedFS and versitygw, whichever are on the PATH.

test_s3_store.py tests the store itself, on the server that TEST_S3_SERVER names.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from minio.error import S3Error

from resources.errors import BucketNotFoundError, ObjectChangedError, StoreError
from resources.object_store.s3 import PART_BYTES, S3Store
from tests.fixtures.s3 import RUNNING, S3Server

NUM_KEYS = 1005
"""More than one page of a listing."""

pytestmark = pytest.mark.s3


@pytest.fixture(scope="module", params=RUNNING)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with RUNNING[request.param](tmp_path_factory.mktemp(request.param)) as server:
        yield server


@pytest.fixture(scope="module")
def store(server: S3Server) -> S3Store:
    return server.store(server.new_bucket())


def test_conditions_are_enforced(server: S3Server, store: S3Store) -> None:
    store.create("one", b"first")
    store.create("one", b"second")
    assert store.read("one") == b"first"
    old = store.stat("one")
    assert old is not None
    store.write("one", b"replaced")
    with pytest.raises(ObjectChangedError):
        store.copy("one", "two", old.etag)
    assert not store.exists("two")
    bucket = store.uri().removeprefix("s3://").strip("/")
    client = server.connection().client()
    with pytest.raises(S3Error, match="PreconditionFailed"):
        client.get_object(bucket, "one", request_headers={"If-Match": old.etag})
    with client.get_object(bucket, "one", offset=2, length=3) as part:
        assert part.read() == b"pla"


def test_large_object_is_stored_in_parts(store: S3Store, tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(range(256)) * (PART_BYTES // 256 * 2 + 1))
    store.upload("large", path)
    info = store.stat("large")
    assert info is not None
    assert (info.size, info.etag[-2:]) == (path.stat().st_size, "-3")
    assert store.read("large") == path.read_bytes()


def test_every_key_is_listed_in_order(store: S3Store) -> None:
    keys = [f"many/{n:04d}" for n in range(NUM_KEYS)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.write(key, b"x"), keys))
    store.write("many-more", b"not below the prefix")
    assert [info.key for info in store.list("many/")] == keys


def test_mistakes_are_explained(server: S3Server, store: S3Store) -> None:
    cases = [
        (replace(server, access_key="nobody").store("any"), StoreError, "AWS_ACCESS_KEY_ID is not known"),
        (replace(server, secret_key="wrong").store("any"), StoreError, "AWS_SECRET_ACCESS_KEY"),
        (server.store("no-such-bucket"), BucketNotFoundError, "bucket does not exist"),
    ]
    for wrong, kind, advice in cases:
        for call in (lambda s=wrong: s.read("x"), lambda s=wrong: s.write("x", b"1"), lambda s=wrong: list(s.list())):
            with pytest.raises(kind, match=advice):
                call()
    assert store.stat("missing") is None
