"""`python -m resources.object_store.copy` between two sets of buckets on a real server."""

import os

import pytest

from resources.object_store.copy import main
from resources.object_store.s3 import PART_BYTES, S3Store
from resources.object_store.s3_settings import S3Connection
from resources.object_store.setup import ALL_BUCKETS
from tests.fixtures.s3 import S3Server

pytestmark = pytest.mark.s3


def test_buckets_are_copied_and_verified(
    s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for side in ("SOURCE_", ""):
        prefix = {"CIFAR_BUCKET_PREFIX": f"{s3_server.new_bucket()}-"}
        for name, value in {**s3_server.environment(), **prefix}.items():
            monkeypatch.setenv(side + name, value)
    target = S3Store(S3Connection.from_environment())
    source = S3Store(
        S3Connection(
            s3_server.endpoint,
            s3_server.access_key,
            s3_server.secret_key,
            bucket_prefix=os.environ["SOURCE_CIFAR_BUCKET_PREFIX"],
        )
    )
    assert main([]) == 1
    assert "bucket does not exist" in capsys.readouterr().err
    source.ensure_buckets(os.environ["SOURCE_CIFAR_BUCKET_PREFIX"] + name for name in ALL_BUCKETS)
    objects = {"a b/\u732b.bin": bytes(range(256)) * (PART_BYTES // 128), "empty": b"", "x": b"1"}
    for key, data in objects.items():
        source.bucket("models").write(key, data)
    assert main([]) == 0
    assert "models: 3 objects, 3 copied, 0 were there, 0 differences\n" in capsys.readouterr().out
    assert {info.key: target.bucket("models").read(info.key) for info in target.bucket("models").list()} == objects
    target.bucket("models").write("x", b"2")
    assert main(["models"]) == 1
    shown = capsys.readouterr()
    assert shown.out == "models: 3 objects, 0 copied, 2 were there, 1 differences\n"
    assert shown.err == f"{target.bucket('models').uri('x')} has other content.\n"
    assert main(["models", "--overwrite"]) == 0
    assert target.bucket("models").read("x") == b"1"
