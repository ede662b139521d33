"""Connection settings for S3: the environment variables that AWS's tools read, validated."""

import os
import re
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import certifi
import urllib3
from minio import Minio
from urllib3.util import Retry, Timeout

from resources.errors import ConfigError

VARIABLES = {
    "endpoint_url": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "access_key": ("AWS_ACCESS_KEY_ID",),
    "secret_key": ("AWS_SECRET_ACCESS_KEY",),
    "session_token": ("AWS_SESSION_TOKEN",),
    "region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    "addressing": ("AWS_S3_ADDRESSING_STYLE",),
    "bucket_prefix": ("CIFAR_BUCKET_PREFIX",),
}
"""The variables of each setting; the first one that is set counts."""
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
CA_VARIABLES = ("AWS_CA_BUNDLE", "SSL_CERT_FILE")
_REFUSED = ("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "AWS_USE_FIPS_ENDPOINT", "AWS_USE_DUALSTACK_ENDPOINT")
ATTEMPTS = 5
OVERLOADED = (429, 500, 502, 503, 504)
"""HTTP statuses that the client retries; it has a separate error for the last attempt."""

_EXPECTED = {
    "endpoint_url": (r"https?://[^/?#@\s]+/?", "http://host:port or https://host:port, without path, query or user"),
    "region": (r"[A-Za-z0-9_-]+", "a region's name, such as eu-central-1"),
    "addressing": ("auto|path|virtual", "auto, path or virtual"),
    "bucket_prefix": (
        "[a-z0-9][a-z0-9-]{0,48}",
        "at most 49 lowercase letters, digits and hyphens, not starting with a hyphen, such as my-team-",
    ),
}


def main_variable(key: str) -> str:
    """The variable for errors and for child processes: the one without a qualifier."""
    return min(VARIABLES[key], key=len)


def variables_set(environment: Mapping[str, str]) -> dict[str, str]:
    """The variable that sets each setting, without unset ones.

    ConfigError for an option of AWS's tools that would be ignored.
    """
    for name in _REFUSED:
        if environment.get(name, "").lower() in ("1", "true"):
            raise ConfigError(f"{name} is not supported: unset it, and set the endpoint in AWS_ENDPOINT_URL.")
    found = {key: [name for name in names if environment.get(name)] for key, names in VARIABLES.items()}
    return {key: names[0] for key, names in found.items() if names}


class S3Client(Minio):
    """The client with conditional requests, for which it has no public methods."""

    def put_new(self, bucket: str, name: str, data: bytes) -> None:
        self._put_object(bucket, name, data, {"If-None-Match": "*", "Content-Type": "application/octet-stream"})

    def remove_unchanged(self, bucket: str, name: str, etag: str) -> None:
        """A server without conditional deletes, such as MinIO, ignores the condition."""
        self._execute("DELETE", bucket, name, headers={"If-Match": f'"{etag}"'})


@dataclass(frozen=True)
class S3Connection:
    """Endpoint, region and credentials. ConfigError names the variable that is missing or malformed."""

    endpoint_url: str = ""
    access_key: str = field(default="", repr=False)
    secret_key: str = field(default="", repr=False)
    session_token: str = field(default="", repr=False)
    region: str = ""
    addressing: str = "auto"
    bucket_prefix: str = ""
    read_seconds: float = 60.0
    pause_seconds: float = 0.2

    def __post_init__(self) -> None:
        required = ("endpoint_url", "access_key", "secret_key")
        if missing := [main_variable(key) for key in required if not getattr(self, key)]:
            raise ConfigError(
                f"The object store is not configured: set {', '.join(missing)} in the environment. AWS's profiles, "
                "roles and web identities are not supported: `aws configure export-credentials --format env` has keys."
            )
        for key, (pattern, expected) in _EXPECTED.items():
            value = getattr(self, key)
            if value and not re.fullmatch(pattern, value):
                raise ConfigError(f"{main_variable(key)} is {value!r}: expected {expected}.")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "S3Connection":
        """The connection that the AWS_... variables describe."""
        values: dict[str, Any] = {key: environment[name] for key, name in variables_set(environment).items()}
        return cls(**values)

    @property
    def host(self) -> str:
        return urlsplit(self.endpoint_url).netloc

    @property
    def secure(self) -> bool:
        return self.endpoint_url.startswith("https:")

    def client(self) -> S3Client:
        """A client, not yet connected. ConfigError for an invalid address."""
        try:
            client = S3Client(
                self.host,
                access_key=self.access_key,
                secret_key=self.secret_key,
                session_token=self.session_token or None,
                secure=self.secure,
                # AWS's host names contain the region; other servers say which one they expect.
                region=self.region or (None if ".amazonaws.com" in self.host else "us-east-1"),
                http_client=self.pool(),
            )
        except ValueError as error:
            raise ConfigError(
                f"AWS_ENDPOINT_URL is {self.endpoint_url!r}: it, or its proxy, is not a valid address: {error}."
            ) from None
        if self.addressing == "virtual":
            client.enable_virtual_style_endpoint()
        if self.addressing == "path":
            client.disable_virtual_style_endpoint()
        return client

    def pool(self) -> urllib3.PoolManager:
        """Connections with retries that trust AWS_CA_BUNDLE and use the proxy from the environment."""
        retries = Retry(
            ATTEMPTS - 1,
            redirect=False,
            status_forcelist=OVERLOADED,
            raise_on_status=False,
            allowed_methods=None,
            backoff_factor=self.pause_seconds,
            respect_retry_after_header=False,
        )
        authorities = [os.environ[name] for name in CA_VARIABLES if os.environ.get(name)]
        options: dict[str, Any] = {
            "timeout": Timeout(connect=5.0, read=self.read_seconds),
            "maxsize": 10,  # a large upload sends three parts at once, and threads share a store
            "retries": retries,
            "cert_reqs": "CERT_REQUIRED",
            "ca_certs": authorities[0] if authorities else certifi.where(),
        }
        parts = urlsplit(self.endpoint_url)
        host = parts.hostname or ""
        proxy = urllib.request.getproxies().get(parts.scheme)
        if not proxy or host in ("localhost", "127.0.0.1", "::1") or urllib.request.proxy_bypass(host):
            return urllib3.PoolManager(**options)
        return urllib3.ProxyManager(proxy, **options)
