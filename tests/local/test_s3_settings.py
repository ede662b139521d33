"""The AWS_... settings with a real MinIO that requires a region, TLS, and bucket names in the host."""

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from minio.credentials.providers import AssumeRoleProvider

from cifar_assets.dataset.stores import open_stores
from resources.errors import StoreError
from resources.object_store import open_store
from resources.object_store.resource import MinioObjectStore, object_store_from_environment
from resources.object_store.s3 import S3Store
from resources.object_store.s3_settings import CA_VARIABLES, S3Connection
from tests.fixtures.s3 import S3Server, certificates_for_loopback, running_minio

REGION = "eu-central-1"
DOMAIN = "s3.test"

pytestmark = pytest.mark.s3


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificates_for_loopback(tmp_path_factory.mktemp("authority") / "certs")


@pytest.fixture(scope="module")
def server(certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with running_minio(tmp_path_factory.mktemp("strict-minio"), certificates, MINIO_SITE_REGION=REGION) as server:
        yield server


@pytest.fixture
def environment(server: S3Server, certificates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings that this server needs, in the environment."""
    variables = {**server.environment(), "AWS_REGION": REGION, "AWS_CA_BUNDLE": str(certificates / "public.crt")}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def resource() -> MinioObjectStore:
    return object_store_from_environment(os.environ).process_config_and_initialize()


def test_region_reaches_the_resource_and_what_it_starts(environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    store = resource()
    store.ensure_buckets()
    store.models.write("region.txt", b"signed for the right region")
    monkeypatch.delenv("AWS_REGION")
    for name, value in store.child_environment().items():
        monkeypatch.setenv(name, value)
    assert open_store(store.models.uri()).read("region.txt") == b"signed for the right region"


def test_default_region_is_used_as_a_fallback(environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_REGION")
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    S3Store.from_environment().ensure_buckets(["by-default-region"])


def test_wrong_region_is_an_error_that_names_the_variable(environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    with pytest.raises(StoreError, match=f"{REGION}.*AWS_REGION"):
        resource().models.read("x")


def test_untrusted_certificate_is_an_error_that_names_the_variable(
    environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in CA_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(StoreError, match="AWS_CA_BUNDLE"):
        resource().models.read("x")
    monkeypatch.setenv("AWS_CA_BUNDLE", "/no/such/bundle")
    with pytest.raises(StoreError, match=r"No such file.*AWS_CA_BUNDLE"):
        resource().models.read("x")


def test_temporary_credentials_need_their_token(
    environment: None, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = resource()
    store.ensure_buckets()
    store.models.write("token.txt", b"with a token")
    pool = S3Connection.from_environment().pool()
    temporary = AssumeRoleProvider(
        sts_endpoint=server.endpoint,
        access_key=server.access_key,
        secret_key=server.secret_key,
        duration_seconds=int(timedelta(hours=1).total_seconds()),
        region=REGION,
        http_client=pool,
    ).retrieve()
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", temporary.access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", temporary.secret_key)
    monkeypatch.setenv("AWS_SESSION_TOKEN", temporary.session_token or "")
    assert resource().models.read("token.txt") == b"with a token"
    assert open_store("s3://models").read("token.txt") == b"with a token"
    monkeypatch.delenv("AWS_SESSION_TOKEN")
    with pytest.raises(StoreError, match="AWS_SESSION_TOKEN"):
        resource().models.read("token.txt")


def test_prefix_is_applied_to_every_bucket_name(environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CIFAR_BUCKET_PREFIX", "my-team-")
    store = resource()
    store.ensure_buckets()
    store.processed.write("x", b"1")
    assert store.processed.uri("x") == "s3://my-team-processed-data/x"
    assert open_stores("s3:///").processed.read("x") == b"1"
    assert open_store("s3://my-team-processed-data/").read("x") == b"1"


def test_bucket_in_the_host_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MinIO is also the proxy, because the buckets' host names cannot be resolved here."""
    with running_minio(tmp_path, MINIO_DOMAIN=DOMAIN) as server:
        for name, value in {**server.environment(), "AWS_ENDPOINT_URL": f"http://{DOMAIN}"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("http_proxy", server.endpoint)
        monkeypatch.setenv("AWS_S3_ADDRESSING_STYLE", "virtual")
        S3Store.from_environment().ensure_buckets(["by-host"])
        store = open_store("s3://by-host/prefix")
        store.write("x", b"content")
        assert store.read("x") == b"content"
        assert [info.key for info in store.list()] == ["x"]
        assert server.store("by-host").read("prefix/x") == b"content"
