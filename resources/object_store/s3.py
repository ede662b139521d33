"""An object store in S3 (MinIO or any other server that speaks it)."""

import builtins
import io
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, TypeVar
from urllib.parse import quote, unquote

from minio.commonconfig import REPLACE, CopySource
from minio.datatypes import Object
from minio.error import MinioException, S3Error
from minio.helpers import DictType
from urllib3.exceptions import HTTPError, IncompleteRead

from resources.errors import ConfigError, ObjectChangedError, ObjectNotFoundError, StoreError
from resources.object_store.base import ObjectInfo, ObjectStore, Transferred
from resources.object_store.folder import write_atomically
from resources.object_store.s3_errors import explain, is_transient
from resources.object_store.s3_settings import S3Client, S3Connection

logger = logging.getLogger(__name__)

PART_BYTES = 16 << 20
ATTEMPTS = 5
_CHUNK_BYTES = 1 << 20
_PAGE_KEYS = 1000
_FAULTS = (HTTPError, MinioException, OSError)
_NOT_FOUND = ("NoSuchKey", "NoSuchObject", "NotFound")
T = TypeVar("T")


class S3Store(ObjectStore):
    """Objects of one bucket below a prefix, or, rooted at nothing, a store whose keys start with a bucket's name.

    Calls that fail by a fault of the connection or of an overloaded server are tried again, with growing pauses; a
    download continues where it stopped.
    """

    def __init__(self, connection: S3Connection, path: str = "", client: S3Client | None = None):
        self._connection = connection
        self._client = client or connection.client()
        self._path = path.strip("/")

    @classmethod
    def from_environment(cls, path: str = "") -> "S3Store":
        """The store rooted at `bucket/prefix`, with endpoint and credentials from AWS_... variables.

        ConfigError naming the variable that is missing or malformed; no connection is opened.
        """
        try:
            return cls(S3Connection.from_environment(), unquote(path))
        except ConfigError as error:
            raise ConfigError(f"Cannot open s3://{path}: {error}") from error

    @classmethod
    def connect(
        cls, endpoint_url: str, access_key: str, secret_key: str, region: str | None = None, path: str = ""
    ) -> "S3Store":
        """The store rooted at `bucket/prefix` of a server. Opens no connection; ConfigError for a bad endpoint."""
        return cls(S3Connection(endpoint_url, access_key, secret_key, region), path)

    def bucket(self, name: str) -> "S3Store":
        return self.at(self._connection.bucket_prefix + name)

    def uri(self, key: str = "") -> str:
        tail = "" if key else "/"
        return f"s3://{quote('/'.join(part for part in (self._path, key) if part))}{tail}".replace("s3:////", "s3:///")

    def at(self, prefix: str) -> "S3Store":
        return S3Store(
            self._connection, "/".join(part for part in (self._path, prefix.strip("/")) if part), self._client
        )

    def ensure_buckets(self, names: Iterable[str]) -> None:
        """Make the buckets that do not exist yet; somebody else making one at the same time is no error."""

        def make(name: str) -> None:
            if self._client.bucket_exists(name):
                return
            try:
                self._client.make_bucket(name)
            except S3Error as error:
                if error.code not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                    raise

        for name in names:
            self._try(lambda name=name: make(name), f"s3://{name}")

    def read(self, key: str) -> bytes:
        bucket, name = self._locate(key)

        def get() -> bytes:
            response = self._client.get_object(bucket, name)
            try:
                return response.read()
            finally:
                response.close()
                response.release_conn()

        return self._try(get, self.uri(key))

    def open(self, key: str) -> BinaryIO:
        # Spooled through the resuming download: a stream that breaks off cannot be read again by its user.
        file = tempfile.SpooledTemporaryFile(max_size=PART_BYTES)  # noqa: SIM115
        try:
            self._copy_to(key, file, None)
        except BaseException:
            file.close()
            raise
        file.seek(0)
        return file  # pyright: ignore[reportReturnType]  (a binary file in all but its declared type)

    def write(self, key: str, data: bytes) -> None:
        bucket, name = self._locate(key)
        self._try(lambda: self._client.put_object(bucket, name, io.BytesIO(data), len(data)), self.uri(key))

    def create(self, key: str, data: bytes) -> bool:
        bucket, name = self._locate(key)
        try:
            self._try(lambda: self._client.put_new(bucket, name, data), self.uri(key))
        except ObjectChangedError:
            return False
        return True

    def upload(self, key: str, path: Path, progress: Transferred | None = None) -> None:
        bucket, name = self._locate(key)
        if not path.is_file():
            raise StoreError(f"Cannot store {self.uri(key)}: {path} is no file.")

        def put() -> None:
            self._client.fput_object(
                bucket,
                name,
                str(path),
                part_size=PART_BYTES,
                progress=_UploadProgress(progress) if progress else None,  # pyright: ignore[reportArgumentType]
            )

        self._try(put, self.uri(key))

    def download(self, key: str, path: Path, progress: Transferred | None = None) -> None:
        write_atomically(path, lambda file: self._copy_to(key, file, progress))

    def stat(self, key: str) -> ObjectInfo | None:
        bucket, name = self._locate(key)
        try:
            found = self._try(lambda: self._client.stat_object(bucket, name), self.uri(key))
        except ObjectNotFoundError:
            return None
        if found.last_modified is None:
            raise StoreError(f"{self.uri(key)}: the server gave no time of change.")
        return ObjectInfo(key, found.size or 0, (found.etag or "").strip('"'), found.last_modified)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        bucket, name = self._locate(prefix, allow_empty=True)
        root = self._path.partition("/")[2]
        skip = len(root) + 1 if root else 0
        start_after: str | None = None
        while True:
            page = self._try(lambda after=start_after: self._page(bucket, name, after), self.uri(prefix))
            for item in page:
                if item.object_name is not None and item.last_modified is not None:
                    key = item.object_name[skip:] if self._path else f"{bucket}/{item.object_name}"
                    yield ObjectInfo(key, item.size or 0, (item.etag or "").strip('"'), item.last_modified)
            if len(page) < _PAGE_KEYS:
                return
            start_after = page[-1].object_name

    def delete(self, key: str, etag: str | None = None) -> bool:
        bucket, name = self._locate(key)
        if etag is None:
            self._try(lambda: self._client.remove_object(bucket, name), self.uri(key))
            return True
        found = self.stat(key)
        if found is not None and found.etag != etag:
            return False
        try:
            self._try(lambda: self._client.remove_unchanged(bucket, name, etag), self.uri(key))
        except ObjectNotFoundError:
            return True
        except ObjectChangedError:
            return False
        return True

    def copy(self, key: str, to_key: str, etag: str | None = None) -> None:
        bucket, name = self._locate(key)
        to_bucket, to_name = self._locate(to_key)
        source = CopySource(bucket, name, match_etag=etag)
        self._try(lambda: self._client.copy_object(to_bucket, to_name, source), self.uri(key))

    def touch(self, key: str) -> None:
        bucket, name = self._locate(key)
        source = CopySource(bucket, name)
        mark: DictType = {"touched": str(time.time_ns())}  # S3 copies an object onto itself only with a change
        self._try(
            lambda: self._client.copy_object(bucket, name, source, metadata=mark, metadata_directive=REPLACE),
            self.uri(key),
        )

    def _page(self, bucket: str, prefix: str, after: str | None) -> "builtins.list[Object]":
        found = self._client.list_objects(bucket, prefix=prefix or None, recursive=True, start_after=after)
        return [item for item, _ in zip(found, range(_PAGE_KEYS), strict=False)]

    def _copy_to(self, key: str, file: IO[bytes], progress: Transferred | None) -> None:
        """Write the object to the file, going on where a transfer broke off as long as the object is the same one."""
        bucket, name = self._locate(key)
        state = _Transfer()

        def go_on() -> None:
            headers: DictType | None = {"If-Match": state.etag} if state.etag else None
            response = self._client.get_object(bucket, name, offset=state.done, request_headers=headers)
            try:
                state.etag = response.headers.get("ETag", state.etag)
                total = state.done + int(response.headers.get("Content-Length", 0))
                # read would drop what arrived before the connection broke.
                while chunk := response.read1(_CHUNK_BYTES):
                    file.write(chunk)
                    state.done += len(chunk)
                    if progress:
                        progress(state.done, total)
                if state.done < total:
                    raise IncompleteRead(state.done, total - state.done)
            finally:
                response.close()
                response.release_conn()

        self._try(go_on, self.uri(key))

    def _locate(self, key: str, *, allow_empty: bool = False) -> tuple[str, str]:
        if any(part in (".", "..") for part in key.split("/")):
            raise ConfigError(
                f"Key {key!r} leaves the store's root {self.uri()}: use a key without '.' and '..' parts."
            )
        bucket, _, name = "/".join(part for part in (self._path, key) if part).partition("/")
        if self._path and not key and name:
            name += "/"
        if not bucket or not (name or allow_empty):
            raise ConfigError(f"s3://{self._path}/{key} names no object: expected s3://bucket/key.")
        return bucket, name

    def _try(self, call: Callable[[], T], uri: str) -> T:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return call()
            except _FAULTS as error:
                if isinstance(error, S3Error) and error.code in _NOT_FOUND:
                    raise ObjectNotFoundError(f"{uri}: no such object.") from error
                if attempt == ATTEMPTS or not is_transient(error):
                    raise explain(error, uri, self._connection.endpoint, attempt) from error
                logger.warning("%s: %s; attempt %d of %d failed.", uri, type(error).__name__, attempt, ATTEMPTS)
                self._connection.sleep(min(0.2 * 2 ** (attempt - 1), 5.0))
        raise AssertionError("unreachable")


@dataclass
class _Transfer:
    """How far a download has come, and of which content."""

    done: int = 0
    etag: str | None = None


class _UploadProgress:
    """What the minio client tells an upload's progress to."""

    def __init__(self, report: Transferred):
        self._report, self._done, self._total = report, 0, 0

    def set_meta(self, object_name: str, total_length: int) -> None:
        self._done, self._total = 0, total_length

    def update(self, length: int) -> None:
        self._done += length
        self._report(self._done, self._total)
