"""How an S3 server is reached: the settings that AWS's own tools read from the environment, checked."""

import os
import re
import ssl
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import certifi
import urllib3
from minio import Minio

from resources.errors import ConfigError
from resources.redaction import redacted

ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
REGION_VARIABLES = ("AWS_REGION", "AWS_DEFAULT_REGION")
CA_VARIABLES = ("AWS_CA_BUNDLE", "SSL_CERT_FILE")

_OTHER_CREDENTIALS = (
    "AWS_PROFILE",
    "AWS_DEFAULT_PROFILE",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_ROLE_ARN",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
_REFUSED_SWITCHES = ("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "AWS_USE_FIPS_ENDPOINT", "AWS_USE_DUALSTACK_ENDPOINT")
_PREFIX = "at most 49 lower-case letters, digits and hyphens, the first not a hyphen, such as my-team-"
_LOOPBACK = re.compile(r"localhost|127\.[\d.]+|::1")


def first_set(environment: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    """The first of the variables that is set to something, or None."""
    return next((name for name in names if environment.get(name)), None)


def refuse_unsupported(environment: Mapping[str, str]) -> None:
    """ConfigError for a setting of AWS's tools that would be ignored here."""
    other = first_set(environment, _OTHER_CREDENTIALS)
    if other and not all(environment.get(name) for name in CREDENTIALS[:2]):
        raise ConfigError(
            f"{other} is set, but credentials are read only from AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and, "
            "for temporary ones, AWS_SESSION_TOKEN: `aws configure export-credentials --format env` has them."
        )
    for name in _REFUSED_SWITCHES:
        if environment.get(name, "").lower() in ("1", "true"):
            raise ConfigError(f"{name} is not supported: unset it, and name the endpoint in AWS_ENDPOINT_URL.")


class S3Client(Minio):
    """The client with the conditional requests that it has no public methods for."""

    def put_new(self, bucket: str, name: str, data: bytes) -> None:
        self._put_object(bucket, name, data, {"If-None-Match": "*", "Content-Type": "application/octet-stream"})

    def remove_unchanged(self, bucket: str, name: str, etag: str) -> None:
        """A server without conditional deletes, such as MinIO, ignores the condition."""
        self._execute("DELETE", bucket, name, headers={"If-Match": f'"{etag}"'})


@dataclass(frozen=True)
class S3Connection:
    """Endpoint, region and credentials, checked."""

    endpoint: str
    access_key: str = field(repr=False)
    secret_key: str = field(repr=False)
    region: str | None = None
    session_token: str | None = field(default=None, repr=False)
    addressing: str = "auto"
    bucket_prefix: str = ""
    connect_seconds: float = 5.0
    read_seconds: float = 60.0
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)

    def __post_init__(self) -> None:
        shown = redacted(self.endpoint)
        try:
            parts = urlsplit(self.endpoint)
            is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            parts, is_address = urlsplit(""), False
        if not is_address:
            raise ConfigError(f"AWS_ENDPOINT_URL is {shown!r}: expected http://host:port or https://host:port.")
        if parts.path not in ("", "/") or parts.query or parts.username:
            raise ConfigError(
                f"AWS_ENDPOINT_URL is {shown}: expected no path, query or user in it. Name the bucket in the "
                "s3://bucket/prefix address and give credentials in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
            )
        for name, value, pattern, expected in (
            ("AWS_REGION", self.region, r"[A-Za-z0-9_-]+", "a region's name, such as eu-central-1"),
            ("AWS_S3_ADDRESSING_STYLE", self.addressing, "auto|path|virtual", "auto, path or virtual"),
            ("CIFAR_BUCKET_PREFIX", self.bucket_prefix, r"[a-z0-9][a-z0-9-]{0,48}", _PREFIX),
        ):
            if value and not re.fullmatch(pattern, value):
                raise ConfigError(f"{name} is {value!r}: expected {expected}.")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "S3Connection":
        """The connection that the AWS_... variables describe.

        ConfigError names the variable that is missing, malformed, or set to something that is not supported here.
        """
        refuse_unsupported(environment)
        endpoint = first_set(environment, ENDPOINT_VARIABLES) or "AWS_ENDPOINT_URL"
        missing = [name for name in (endpoint, *CREDENTIALS[:2]) if not environment.get(name)]
        if missing:
            raise ConfigError(f"The object store is not configured: set {', '.join(missing)} in the environment.")
        access_key, secret_key, session_token = (environment.get(name, "") for name in CREDENTIALS)
        return cls(
            environment[endpoint],
            access_key,
            secret_key,
            region=environment.get(first_set(environment, REGION_VARIABLES) or "") or None,
            session_token=session_token or None,
            addressing=environment.get("AWS_S3_ADDRESSING_STYLE") or "auto",
            bucket_prefix=environment.get("CIFAR_BUCKET_PREFIX", ""),
        )

    @property
    def host(self) -> str:
        return urlsplit(self.endpoint).netloc

    @property
    def secure(self) -> bool:
        return self.endpoint.startswith("https:")

    def client(self) -> S3Client:
        """A client that leaves retrying to its user; nothing is connected yet."""
        try:
            client = S3Client(
                self.host,
                access_key=self.access_key,
                secret_key=self.secret_key,
                session_token=self.session_token,
                secure=self.secure,
                # AWS's host names hold the region; other servers say which they expect.
                region=self.region or (None if ".amazonaws.com" in self.host else "us-east-1"),
                http_client=self.pool(),
            )
        except ValueError as error:
            raise ConfigError(f"AWS_ENDPOINT_URL is {self.endpoint}: {error}.") from error
        if self.addressing == "virtual":
            client.enable_virtual_style_endpoint()
        if self.addressing == "path":
            client.disable_virtual_style_endpoint()
        return client

    def pool(self) -> urllib3.PoolManager:
        """Connections that trust AWS_CA_BUNDLE and use the proxy of the environment, except to this machine."""
        options: dict[str, Any] = {
            "timeout": urllib3.Timeout(connect=self.connect_seconds, read=self.read_seconds),
            "maxsize": 10,
            "retries": False,
            "cert_reqs": "CERT_REQUIRED",
            "ca_certs": _ca_bundle() if self.secure else certifi.where(),
        }
        parts = urlsplit(self.endpoint)
        host = parts.hostname or ""
        proxy = urllib.request.getproxies().get(parts.scheme)
        if not proxy or _LOOPBACK.fullmatch(host) or urllib.request.proxy_bypass(host):
            return urllib3.PoolManager(**options)
        try:
            user = urlsplit(proxy)
        except ValueError as error:
            raise ConfigError(f"The proxy for {parts.scheme} is {redacted(proxy)!r}: {error}.") from error
        if user.username:
            credentials = f"{user.username}:{user.password or ''}"
            options["proxy_headers"] = urllib3.make_headers(proxy_basic_auth=credentials)
        return urllib3.ProxyManager(proxy, **options)


def _ca_bundle() -> str:
    """The certificate authorities to trust. ConfigError for a variable that names no such file."""
    name = first_set(os.environ, CA_VARIABLES)
    path = os.environ[name] if name else certifi.where()
    try:
        ssl.create_default_context(cafile=path)
    except OSError as error:
        raise ConfigError(f"{name} is {path!r}: expected a file of certificates in PEM format ({error}).") from error
    return path
