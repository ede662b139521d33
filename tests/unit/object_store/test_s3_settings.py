"""Settings of AWS's tools: each is used, or rejected by name."""

import pytest
import urllib3

from resources.errors import ConfigError
from resources.object_store.resource import MinioObjectStore, object_store_from_environment
from resources.object_store.s3 import S3Store
from resources.object_store.s3_settings import S3Connection

KEYS = {"AWS_ENDPOINT_URL": "http://host:9000", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}


def read(**variables: str) -> S3Connection:
    return S3Connection.from_environment(KEYS | variables)


def resource(monkeypatch: pytest.MonkeyPatch, **variables: str) -> MinioObjectStore:
    """The resource as Dagster resolves it with these environment variables."""
    for name, value in (KEYS | variables).items():
        monkeypatch.setenv(name, value)
    return object_store_from_environment(KEYS | variables).process_config_and_initialize()


@pytest.mark.parametrize(
    ("variables", "field", "value"),
    [
        ({"AWS_REGION": "eu-central-1"}, "region", "eu-central-1"),
        ({"AWS_DEFAULT_REGION": "eu-west-3"}, "region", "eu-west-3"),
        ({"AWS_REGION": "eu-central-1", "AWS_DEFAULT_REGION": "eu-west-3"}, "region", "eu-central-1"),
        ({"AWS_SESSION_TOKEN": "token"}, "session_token", "token"),
        ({"AWS_ENDPOINT_URL_S3": "https://s3.example"}, "endpoint_url", "https://s3.example"),
        ({"AWS_S3_ADDRESSING_STYLE": "virtual"}, "addressing", "virtual"),
        ({"CIFAR_BUCKET_PREFIX": "team-"}, "bucket_prefix", "team-"),
    ],
)
def test_setting_is_honored_by_commands_and_by_the_resource(
    variables: dict[str, str], field: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert getattr(read(**variables), field) == value
    assert getattr(resource(monkeypatch, **variables).root()._connection, field) == value


def test_pods_get_the_settings_that_the_resource_has(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"AWS_DEFAULT_REGION": "eu-west-3", "AWS_SESSION_TOKEN": "t", "AWS_S3_ADDRESSING_STYLE": "path"}
    child = resource(monkeypatch, **variables).child_environment()
    assert S3Connection.from_environment(child) == read(**variables)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"AWS_REGION": "eu central"}, "AWS_REGION is 'eu central'"),
        ({"AWS_S3_ADDRESSING_STYLE": "host"}, "AWS_S3_ADDRESSING_STYLE is 'host'"),
        ({"CIFAR_BUCKET_PREFIX": "My_"}, "CIFAR_BUCKET_PREFIX is 'My_'"),
        ({"CIFAR_BUCKET_PREFIX": "p" * 50}, "CIFAR_BUCKET_PREFIX"),
        ({"AWS_USE_FIPS_ENDPOINT": "true"}, "AWS_USE_FIPS_ENDPOINT is not supported"),
        ({"AWS_USE_DUALSTACK_ENDPOINT": "True"}, "AWS_USE_DUALSTACK_ENDPOINT is not supported"),
        ({"AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}, "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS is not supported"),
        (
            {"AWS_ACCESS_KEY_ID": "", "AWS_PROFILE": "work"},
            "set AWS_ACCESS_KEY_ID .* profiles, roles and web identities",
        ),
        ({"AWS_ENDPOINT_URL": "http://host:99999"}, "AWS_ENDPOINT_URL is 'http://host:99999'"),
        ({"AWS_ENDPOINT_URL": "u:hush@host:9000"}, "AWS_ENDPOINT_URL is"),
        ({"AWS_ENDPOINT_URL": "http://[host"}, "AWS_ENDPOINT_URL is"),
    ],
)
def test_unusable_setting_is_refused_by_name(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(**variables).client()
    assert "hush" not in str(caught.value)
    with pytest.raises(ConfigError, match=message):
        resource(monkeypatch, **variables).root()


@pytest.mark.parametrize(
    ("endpoint", "style", "expected"),
    [
        ("http://host:9000", "auto", "http://host:9000/bucket/key"),
        ("http://host:9000", "virtual", "http://bucket.host:9000/key"),
        ("https://s3.eu-west-3.amazonaws.com", "auto", "https://bucket.s3.eu-west-3.amazonaws.com/key"),
        ("https://s3.eu-west-3.amazonaws.com", "path", "https://s3.eu-west-3.amazonaws.com/bucket/key"),
    ],
)
def test_addressing_style_decides_where_the_bucket_is_named(endpoint: str, style: str, expected: str) -> None:
    client = read(AWS_ENDPOINT_URL=endpoint, AWS_S3_ADDRESSING_STYLE=style).client()
    region = client._base_url.region or ""
    assert region == ("eu-west-3" if "amazonaws" in endpoint else "us-east-1")
    built = client._base_url.build(method="GET", region=region, bucket_name="bucket", object_name="key")
    assert built.geturl() == expected


def test_proxy_of_the_environment_is_used_except_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", ".svc")
    hosts = {"host:9000": True, "minio.platform.svc:9000": False, "localhost:9000": False, "127.0.0.1:9000": False}
    for host, proxied in hosts.items():
        pool = read(AWS_ENDPOINT_URL=f"http://{host}").pool()
        assert isinstance(pool, urllib3.ProxyManager) is proxied, host


def test_prefix_is_part_of_bucket_names_and_of_addresses() -> None:
    store = S3Store(read(CIFAR_BUCKET_PREFIX="team-"))
    assert store.bucket("models").uri("x") == "s3://team-models/x"
    assert store.at("models").uri("x") == "s3://models/x"  # an address names the bucket as it is
