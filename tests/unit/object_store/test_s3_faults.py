"""Connection faults, with a server that misbehaves in a known way."""

import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from resources.errors import BucketNotFoundError, ConfigError, StoreError
from resources.object_store import open_store
from resources.object_store.s3 import S3Store
from resources.object_store.s3_settings import ATTEMPTS, CA_VARIABLES, S3Connection

Answer = Callable[[BaseHTTPRequestHandler, int], None]
BODY = bytes(range(256)) * 400


def reply(handler: BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: str) -> None:
    handler.send_response(status)
    headers.setdefault("Content_Length", str(len(body)))
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


def error(code: str, message: str = "told so") -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()


class Fake:
    """Answers each request with the given function, which gets the number of the request."""

    def __init__(self, endpoint: str):
        self.endpoint = endpoint
        self.answer: Answer = lambda handler, number: reply(handler, 200, BODY)
        self.requests: list[tuple[str, str | None]] = []

    def store(self) -> S3Store:
        return S3Store(S3Connection(self.endpoint, "a", "b", read_seconds=60, pause_seconds=0), "bucket")


@pytest.fixture
def fake() -> Iterator[Fake]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            state.requests.append((self.command, self.headers.get("Range")))
            length = int(self.headers.get("Content-Length", 0))
            self.rfile.read(length)
            state.answer(self, len(state.requests))

        do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_any  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        state = Fake(f"http://127.0.0.1:{http.server_port}")
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield state
        http.shutdown()
        thread.join()


@pytest.mark.parametrize("fault", ["SlowDown", "InternalError", "gateway", "drop"])
def test_transient_faults_are_retried(fault: str, fake: Fake) -> None:
    def answer(handler: BaseHTTPRequestHandler, number: int) -> None:
        if number >= 3:
            reply(handler, 200, BODY)
        elif fault == "gateway":
            reply(handler, 502, b"Bad Gateway", Content_Type="text/html")
        elif fault == "drop":
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
        else:
            reply(handler, 503, error(fault), Content_Type="application/xml")

    fake.answer = answer
    assert fake.store().read("x") == BODY
    assert len(fake.requests) == 3


@pytest.mark.parametrize(("status", "code"), [(400, "RequestTimeout"), (409, "OperationAborted")])
def test_refused_objects_are_sent_again(status: int, code: str, fake: Fake, tmp_path: Path) -> None:
    def answer(handler: BaseHTTPRequestHandler, number: int) -> None:
        if refuses or number < 3:
            reply(handler, status, error(code), Content_Type="application/xml")
        else:
            reply(handler, 200)

    refuses = False
    fake.answer = answer
    (tmp_path / "x").write_bytes(BODY)
    fake.store().upload("x", tmp_path / "x")
    assert len(fake.requests) == 3
    refuses = True
    with pytest.raises(StoreError, match=code) as caught:
        fake.store().write("x", b"1")
    assert caught.value.transient
    assert len(fake.requests) == 3 + ATTEMPTS


def test_large_object_is_stored_though_the_answer_to_its_last_request_is_lost(
    fake: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    data, parts, stored, lost = bytes(11 << 20), {}, [], []

    def answer(handler: BaseHTTPRequestHandler, number: int) -> None:
        query = parse_qs(urlsplit(handler.path).query, keep_blank_values=True)
        if "uploads" in query:
            parts.clear()
            reply(handler, 200, b"<Upload><UploadId>id</UploadId></Upload>")
        elif handler.command == "PUT":
            parts[query["partNumber"][0]] = int(handler.headers["Content-Length"])
            reply(handler, 200, ETag='"tag"')
        elif not parts:
            reply(handler, 404, error("NoSuchUpload"), Content_Type="application/xml")
        else:
            stored.append(sum(parts.values()))
            parts.clear()
            if lost:
                reply(handler, 200, b"<Done><ETag>tag</ETag></Done>")
            else:
                lost.append(number)
                handler.connection.shutdown(socket.SHUT_RDWR)
                handler.close_connection = True

    fake.answer = answer
    fake.store().write("x", data)
    assert stored == [len(data)] * 2
    assert "pool is full" not in caplog.text, "parts are sent at once"


def test_object_is_created_though_the_answer_is_lost(fake: Fake) -> None:
    def answer(handler: BaseHTTPRequestHandler, number: int) -> None:
        assert handler.headers["If-None-Match"] == "*"
        if number == 1:  # stored
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
        else:
            reply(handler, 412, error("PreconditionFailed"), Content_Type="application/xml")

    fake.answer = answer
    fake.store().create("x", b"1")
    assert len(fake.requests) == 2


def test_create_that_conflicts_with_another_write_is_sent_again(fake: Fake) -> None:
    """S3 answers so while another writer of the same key is at work."""

    def answer(handler: BaseHTTPRequestHandler, number: int) -> None:
        status, code = (409, "ConditionalRequestConflict") if number == 1 else (412, "PreconditionFailed")
        reply(handler, status, error(code), Content_Type="application/xml")

    fake.answer = answer
    fake.store().create("x", b"1")
    assert len(fake.requests) == 2


@pytest.mark.parametrize(
    ("status", "body", "kind", "reason"),
    [
        (503, error("SlowDownWrite"), "application/xml", "SlowDownWrite: told so"),
        (500, error("InternalError"), "application/xml", "InternalError: told so"),
        (502, b"<html>Bad Gateway</html>", "text/html", "Response code: 502"),
        (503, b"", "application/xml", "Response code: 503"),
    ],
)
def test_persistent_fault_names_object_server_and_reason(
    status: int, body: bytes, kind: str, reason: str, fake: Fake
) -> None:
    fake.answer = lambda handler, number: reply(handler, status, body, Content_Type=kind)
    with pytest.raises(StoreError, match=rf"s3://bucket/x at http://127\.0\.0\.1.*{reason}") as caught:
        fake.store().write("x", b"1")
    assert caught.value.transient
    assert len(fake.requests) == ATTEMPTS
    with pytest.raises(StoreError, match=f"{status}|{reason}") as caught:
        fake.store().stat("x")
    assert caught.value.transient


def test_interrupted_download_resumes(fake: Fake, tmp_path: Path) -> None:
    def answer(handler: BaseHTTPRequestHandler, number: int) -> None:
        asked = handler.headers.get("Range")
        start = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        assert number == 1 or handler.headers.get("If-Match") == '"tag"'
        part = BODY[start : start + 40_000]
        reply(handler, 206 if start else 200, part, Content_Length=str(len(BODY) - start), ETag='"tag"')
        if start + len(part) < len(BODY):
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True

    fake.answer = answer
    fake.store().download("x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == BODY
    assert len(fake.requests) == 3


def test_object_replaced_during_download_is_not_mixed(fake: Fake, tmp_path: Path) -> None:
    def answer(handler: BaseHTTPRequestHandler, number: int) -> None:
        if number == 1:
            reply(handler, 200, BODY[:1000], Content_Length=str(len(BODY)), ETag='"one"')
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
        else:
            reply(handler, 412, error("PreconditionFailed"), Content_Type="application/xml")

    fake.answer = answer
    with pytest.raises(StoreError, match="replaced while it was being read") as caught:
        fake.store().download("x", tmp_path / "x")
    assert caught.value.transient
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("status", "code", "advice"),
    [
        (403, "RequestTimeTooSkewed", "clocks"),
        (403, "SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"),
        (403, "InvalidAccessKeyId", "AWS_ACCESS_KEY_ID"),
        (404, "XAdminUserNotFound", "AWS_ACCESS_KEY_ID"),
        (403, "AccessDenied", "policy"),
        (404, "NoSuchBucket", "bucket does not exist"),
        (400, "AuthorizationHeaderMalformed", "AWS_REGION"),
        (507, "XMinioStorageFull", "disk is full"),
    ],
)
def test_mistakes_are_not_retried_and_say_what_to_do(status: int, code: str, advice: str, fake: Fake) -> None:
    fake.answer = lambda handler, number: reply(handler, status, error(code), Content_Type="application/xml")
    with pytest.raises(StoreError, match=advice) as caught:
        fake.store().read("x")
    assert not caught.value.transient
    assert len(fake.requests) == 1


def test_a_missing_bucket_is_told_apart(fake: Fake) -> None:
    fake.answer = lambda handler, number: reply(handler, 404, error("NoSuchBucket"), Content_Type="application/xml")
    with pytest.raises(BucketNotFoundError):
        list(fake.store().list())


def test_server_without_s3_is_recognized(fake: Fake) -> None:
    fake.answer = lambda handler, number: reply(handler, 404, b"<html>console</html>", Content_Type="text/html")
    with pytest.raises(StoreError, match=r"no response from an S3 server.*not a web console"):
        fake.store().read("x")


def test_unreachable_server_is_an_error(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(
            StoreError, match=r"no response from an S3 server in 5 attempts.*AWS_ENDPOINT_URL"
        ) as caught:
            S3Store(S3Connection(endpoint, "a", "b", pause_seconds=0), "bucket").read("x")
        assert caught.value.transient


def test_tls_against_a_plain_server_says_so(fake: Fake) -> None:
    fake.endpoint = fake.endpoint.replace("http:", "https:")
    with pytest.raises(StoreError, match=r"SSL.*AWS_CA_BUNDLE") as caught:
        fake.store().read("x")
    assert not caught.value.transient


@pytest.mark.parametrize("name", CA_VARIABLES)
@pytest.mark.parametrize("content", [None, "not a certificate"])
def test_unusable_ca_bundle_is_an_error_that_names_the_variable(
    name: str, content: str | None, fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in CA_VARIABLES:
        monkeypatch.delenv(other, raising=False)
    if content:
        (tmp_path / "ca.pem").write_text(content)
    monkeypatch.setenv(name, str(tmp_path / "ca.pem"))
    assert fake.store().read("x") == BODY, "plain HTTP needs none"
    fake.endpoint = fake.endpoint.replace("http:", "https:")
    with pytest.raises(StoreError, match="AWS_CA_BUNDLE") as caught:
        fake.store().read("x")
    assert not caught.value.transient


@pytest.mark.parametrize(
    "endpoint",
    [
        "localhost:9000",
        "minio",
        "ftp://host",
        "http://",
        "http://host:9000/bucket",
        "https://host/?x=1",
        "http://u:p@host",
    ],
)
def test_a_malformed_endpoint_is_refused_at_once(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL is") as caught:
        S3Connection(endpoint, "a", "b")
    assert "u:p" not in str(caught.value)


def test_missing_settings_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"):
        open_store("s3://bucket/prefix")


def test_secrets_are_not_shown() -> None:
    assert "hush" not in repr(S3Connection("http://host", "hush-a", "hush-b"))


def test_full_local_disk_is_not_blamed_on_the_server(fake: Fake) -> None:
    fake.answer = lambda handler, number: reply(handler, 200, BODY, Content_Length=str(len(BODY)), ETag='"one"')
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(StoreError, match="disk failed") as caught:
        fake.store()._copy_to("x", full)
    assert not caught.value.transient
    assert len(fake.requests) == 1
