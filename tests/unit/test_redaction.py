"""Redaction of credentials in addresses."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resources.errors import ConfigError, StoreError
from resources.kubernetes.errors import ApiRefusedError
from resources.redaction import has_credentials, redacted


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:hush@host/path", "http://***@host/path"),
        ("postgresql+psycopg2://user:hush@db/x", "postgresql+psycopg2://***@db/x"),
        ("https://hush@host", "https://***@host"),
        ("user:hush@host:9000", "***@host:9000"),
        ("https://h/x?X-Amz-Signature=hush&X-Amz-Expires=60", "https://h/x?X-Amz-Signature=***&X-Amz-Expires=***"),
        ("failed with url: /x?sig=hush (Caused by timeout)", "failed with url: /x?sig=*** (Caused by timeout)"),
        ("'https://h/x?token=hush'.", "'https://h/x?token=***'."),
        ("https://h/x?a=hush#md5=0123", "https://h/x?a=***#md5=0123"),
    ],
)
def test_credentials_in_an_address_are_hidden(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert redacted(shown) == shown
    assert has_credentials(text)


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/user@example.com/a=b",
        "file:///home/me/x.tar.gz",
        "sqlite:////data/mlflow.db",
        "http://minio.cifar-platform.svc:9000",
        "quay.io/minio/minio:RELEASE.2025-09-07T16-13-09Z@sha256:" + "0" * 64,
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz#md5=c58f",
        "Is this right? Set a=b.",
    ],
)
def test_other_text_is_shown_as_it_is(text: str) -> None:
    assert redacted(text) == text
    assert not has_credentials(text)


_WORDS = st.text("abcXYZ019-_.~%+!$*(),;'", min_size=1, max_size=12)


@given(user=_WORDS, password=_WORDS.map(lambda word: f"hush{word}"), host=st.sampled_from(["h", "h:90", "[::1]:9"]))
def test_no_password_is_shown_whatever_it_is(user: str, password: str, host: str) -> None:
    for address in (f"https://{user}:{password}@{host}/x", f"https://{host}/x?{user}=1&{user}={password}"):
        assert "hush" not in redacted(f"Could not read {address!r}: gone.")


@pytest.mark.parametrize("kind", [ConfigError, StoreError, ApiRefusedError])
def test_errors_of_this_project_show_no_credentials(kind: type[Exception]) -> None:
    assert str(kind("http://u:hush@host is away")) == "http://***@host is away"
