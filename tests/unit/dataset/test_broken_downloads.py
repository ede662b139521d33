"""Cut, substituted and interrupted downloads."""

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cifar_assets.dataset.sources import download
from cifar_assets.dataset.versions.raw import build_raw_version, current_raw_digest
from resources.errors import DataError, ExplainedError
from resources.object_store import FolderStore


@dataclass
class Server:
    """Serves one body under any path, and can close the connection early."""

    body: bytes = b""
    break_after: int | None = None
    ranges: bool = True
    status: int = 200
    requests: list[str | None] = field(default_factory=list)
    url: str = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        asked = handler.headers.get("Range")
        self.requests.append(asked)
        start = 0
        if asked and self.ranges:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        if start and start >= len(self.body):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(self.body)}")
            handler.end_headers()
            return
        handler.send_response(206 if start else self.status)
        handler.send_header("Content-Length", str(len(self.body) - start))
        handler.end_headers()
        rest = self.body[start:]
        handler.wfile.write(rest if self.break_after is None else rest[: self.break_after])


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.answer(self)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        state.url = f"http://127.0.0.1:{http.server_port}/cifar-10-python.tar.gz"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(download, "ATTEMPTS", 2)
        yield state
        http.shutdown()
        thread.join()


def md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def pinned(server: Server) -> str:
    return f"{server.url}#md5={md5(server.body)}"


def assert_nothing_left(raw: FolderStore, tmp_path: Path) -> None:
    assert list(raw.list("objects/")) == []
    assert list(raw.list("versions/")) == []
    assert current_raw_digest(raw) is None


HTML = b"<!DOCTYPE html><html><body>Please log in</body></html>"


@pytest.mark.parametrize("is_pinned", [True, False])
@pytest.mark.parametrize("damage", ["cut", "empty", "page", "flipped byte"])
def test_broken_file_is_refused_and_fetched_again_next_time(
    damage: str, is_pinned: bool, make, raw: FolderStore, server: Server, tmp_path: Path
) -> None:
    good = make.archive()
    broken = {
        "cut": good[: int(len(good) * 0.6)],
        "empty": b"",
        "page": HTML,
        "flipped byte": good[:-200] + bytes([good[-200] ^ 1]) + good[-199:],
    }[damage]
    source = f"{server.url}#md5={md5(good)}" if is_pinned else server.url
    server.body = broken
    with pytest.raises(DataError) as caught:
        build_raw_version(raw, source)
    message = str(caught.value)
    if is_pinned:
        assert md5(good) in message
        assert md5(broken) in message
    assert server.url in message
    assert f"{len(broken):,} bytes" in message or damage == "page"
    assert_nothing_left(raw, tmp_path)

    server.body = good
    version = build_raw_version(raw, source)
    assert version.manifest.rows == 120
    assert current_raw_digest(raw) == version.digest


def test_good_copy_is_not_fetched_again(make, raw: FolderStore, server: Server) -> None:
    server.body = make.archive()
    source = f"{server.url}#md5={md5(server.body)}"
    first = build_raw_version(raw, source)
    assert build_raw_version(raw, source).digest == first.digest
    assert len(server.requests) == 1
    # A copy that went bad in the store is.
    raw.write(first.manifest.objects[0].key, b"damaged")
    assert build_raw_version(raw, source).digest == first.digest
    assert len(server.requests) == 2


def test_interrupted_transfer_continues_where_it_stopped(make, raw: FolderStore, server: Server) -> None:
    server.body = make.archive()
    server.break_after = len(server.body) // 2 + 1
    version = build_raw_version(raw, pinned(server))
    assert server.requests == [None, f"bytes={server.break_after}-"]
    assert version.manifest.objects[0].sha256 == hashlib.sha256(server.body).hexdigest()


@pytest.mark.parametrize("extra", [b"", b"of another file"])
def test_transfer_that_broke_off_after_the_last_byte_starts_again(
    extra: bytes, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    server.body = b"x" * 1000
    target = tmp_path / "object"
    target.write_bytes(server.body + extra)
    download.fetch(server.url, target, f"md5={md5(server.body)}")
    assert target.read_bytes() == server.body
    assert server.requests == [f"bytes={1000 + len(extra)}-", None]


def test_file_without_a_digest_is_fetched_whole(make, raw: FolderStore, server: Server, tmp_path: Path) -> None:
    server.body = make.archive(1)
    server.break_after = 1000
    with pytest.raises(DataError):
        build_raw_version(raw, server.url)
    assert_nothing_left(raw, tmp_path)
    server.body, server.break_after = make.archive(2), None
    version = build_raw_version(raw, server.url)
    assert server.requests == [None] * 3
    assert version.manifest.objects[0].sha256 == hashlib.sha256(server.body).hexdigest()


def test_refusing_server_is_not_asked_again(raw: FolderStore, server: Server, tmp_path: Path) -> None:
    server.body, server.status = HTML, 404
    with pytest.raises(DataError, match="404"):
        build_raw_version(raw, server.url)
    assert len(server.requests) == 1
    assert_nothing_left(raw, tmp_path)


def test_without_a_network_the_error_names_the_other_sources(
    raw: FolderStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    monkeypatch.setattr(
        "cifar_assets.dataset.sources.importing.OFFICIAL_URL", "http://127.0.0.1:9/cifar-10-python.tar.gz"
    )
    with pytest.raises(DataError, match=r"Cannot fetch.*'synthetic'.*Parquet"):
        build_raw_version(raw, "download")
    assert_nothing_left(raw, tmp_path)


@pytest.mark.parametrize("name", ["a b.parquet", "caf\u00e9.parquet", "50%25.parquet", "a+b;c='d'.parquet"])
def test_address_is_sent_encoded_and_otherwise_as_it_is(name: str, make, raw: FolderStore, server: Server) -> None:
    server.body = make.parquet(make.images(20), make.labels(20))
    base = server.url.rpartition("/")[0]
    assert build_raw_version(raw, f"{base}/{name}").manifest.rows == 20


@pytest.mark.parametrize("address", ["http://[::1/a.parquet", "http://host:port/a.parquet", "http:///a.parquet"])
def test_invalid_address_is_an_error_at_once(address: str, raw: FolderStore) -> None:
    with pytest.raises(ExplainedError, match=r"failed after|cannot be accessed"):
        build_raw_version(raw, address)


@pytest.mark.parametrize("keep", [0.0, 0.2, 0.6, 0.99])
def test_a_local_archive_that_is_cut_is_refused(keep: float, make, raw: FolderStore, tmp_path: Path) -> None:
    good = make.archive()
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(good[: int(len(good) * keep)])
    with pytest.raises(DataError, match=r"(?i)download or upload it again"):
        build_raw_version(raw, str(path))
    assert_nothing_left(raw, tmp_path)
    path.write_bytes(good)
    assert build_raw_version(raw, str(path)).manifest.rows == 120


def test_a_plain_tar_cut_between_members_is_refused(make, raw: FolderStore, tmp_path: Path) -> None:
    members = make.python_members()
    members.pop("cifar-10-batches-py/data_batch_4")
    path = tmp_path / "a.tar.gz"
    path.write_bytes(make.tar(members))
    with pytest.raises(DataError, match="missing data_batch_4"):
        build_raw_version(raw, str(path))


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.95])
def test_a_cut_parquet_file_is_refused(keep: float, make, raw: FolderStore, source: str) -> None:
    path = Path(source, "train-00000-of-00001.parquet")
    good = path.read_bytes()
    path.write_bytes(good[: int(len(good) * keep)])
    with pytest.raises(DataError, match="not a readable Parquet file"):
        build_raw_version(raw, source)
    assert current_raw_digest(raw) is None


def test_a_wrong_digest_of_a_local_file_names_both(make, raw: FolderStore, tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(make.archive())
    with pytest.raises(DataError, match=r"expected sha256 0+, got [0-9a-f]{64}"):
        build_raw_version(raw, f"{path}#sha256={'0' * 64}")


def test_secrets_in_an_address_are_not_shown(make, raw: FolderStore, server: Server) -> None:
    server.body = make.archive()
    address = f"{server.url}?signature=hush"
    version = build_raw_version(raw, address)
    stored = b"".join(raw.read(info.key) for info in raw.list("versions/"))
    assert "hush" not in version.source
    assert b"hush" not in stored
    server.status, server.body = 403, b"denied"
    with pytest.raises(DataError, match="403") as caught:
        build_raw_version(raw, address)
    assert "hush" not in str(caught.value)
