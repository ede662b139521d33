"""An object store in S3 (MinIO or any other server that speaks it)."""

import builtins
import errno
import io
import logging
import re
import ssl
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, Concatenate, TypeVar
from urllib.parse import quote, unquote

from minio.commonconfig import REPLACE, CopySource
from minio.datatypes import Object
from minio.error import InvalidResponseError, MinioException, S3Error, ServerError
from urllib3.exceptions import HTTPError, IncompleteRead, LocationParseError, SSLError

from resources.errors import ConfigError, ObjectChangedError, ObjectNotFoundError, StoreError
from resources.object_store.base import ObjectInfo, ObjectStore, Transferred
from resources.object_store.folder import write_atomically
from resources.object_store.s3_settings import S3Client, S3Connection

logger = logging.getLogger(__name__)

PART_BYTES = 16 << 20
ATTEMPTS = 5
_CHUNK_BYTES = 1 << 20
_PAGE_KEYS = 1000
_FAULTS = (HTTPError, MinioException, OSError)
_NOT_FOUND = ("NoSuchKey", "NoSuchObject", "NotFound")
_BUCKET_EXISTS = ("BucketAlreadyOwnedByYou", "BucketAlreadyExists")
_TRANSIENT_CODES = (
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "SlowDownRead",
    "SlowDownWrite",
    "XMinioServerNotInitialized",
)
_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.ENOENT, errno.EIO)
_ADVICE = {
    "AccessDenied": "The credentials are known but not allowed to do this: check the policy of AWS_ACCESS_KEY_ID.",
    "InvalidAccessKeyId": "AWS_ACCESS_KEY_ID is not known to this server: check it, and the endpoint.",
    "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID: check it for a typing "
    "error or a line break at its end.",
    **dict.fromkeys(
        ("ExpiredToken", "InvalidToken", "InvalidTokenId"),
        "AWS_SESSION_TOKEN is missing, expired, or belongs to other keys: renew all three.",
    ),
    "RequestTimeTooSkewed": "The clocks of this machine and of the server differ by over 15 minutes: correct them.",
    "NoSuchBucket": "The bucket does not exist: make it, or correct the name in the s3:// address.",
    "InvalidBucketName": "The bucket's name is not allowed: 3 to 63 lower-case letters, digits, dots and hyphens.",
    "PreconditionFailed": "The object was replaced while it was being read: read it again.",
    "XMinioStorageFull": "The server's disk is full: free some space.",
    "BadRequest": "The server may speak TLS: use https:// in AWS_ENDPOINT_URL then.",
    "AuthorizationHeaderMalformed": "The server expects another region: set AWS_REGION to the one in the message.",
}
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
    def connect(cls, endpoint_url: str, access_key: str, secret_key: str, path: str = "") -> "S3Store":
        """The store rooted at `bucket/prefix` of a server. Opens no connection; ConfigError for a bad endpoint."""
        return cls(S3Connection(endpoint_url, access_key, secret_key), path)

    def bucket(self, name: str) -> "S3Store":
        return self.at(self._connection.bucket_prefix + name)

    def uri(self, key: str = "") -> str:
        tail = "" if key else "/"
        return f"s3://{quote(self._join(key))}{tail}".replace("s3:////", "s3:///")

    def at(self, prefix: str) -> "S3Store":
        return S3Store(self._connection, self._join(prefix.strip("/")), self._client)

    def ensure_buckets(self, names: Iterable[str]) -> None:
        """Make the buckets that do not exist yet. Another process may make the same one at the same time."""

        def make(name: str) -> None:
            try:
                if not self._client.bucket_exists(name):
                    self._client.make_bucket(name)
            except S3Error as error:
                if error.code not in _BUCKET_EXISTS:
                    raise

        for name in names:
            self._try(f"s3://{name}", make, name)

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
        self._call(key, lambda bucket, name: self._client.put_object(bucket, name, io.BytesIO(data), len(data)))

    def create(self, key: str, data: bytes) -> bool:
        try:
            self._call(key, self._client.put_new, data)
        except ObjectChangedError:
            return False
        return True

    def upload(self, key: str, path: Path) -> None:
        if not path.is_file():
            raise StoreError(f"Cannot store {self.uri(key)}: {path} is not a file.")
        self._call(key, self._client.fput_object, str(path), part_size=PART_BYTES)

    def download(self, key: str, path: Path, progress: Transferred | None = None) -> None:
        write_atomically(path, lambda file: self._copy_to(key, file, progress))

    def stat(self, key: str) -> ObjectInfo | None:
        try:
            return _info(key, self._call(key, self._client.stat_object))
        except ObjectNotFoundError:
            return None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        bucket, name = self._locate(prefix, allow_empty=True)
        root = self._path.partition("/")[2]
        skip = len(root) + 1 if root else 0
        start_after: str | None = None
        while True:
            page = self._try(self.uri(prefix), self._page, bucket, name, start_after)
            for item in page:
                key = str(item.object_name)
                yield _info(key[skip:] if self._path else f"{bucket}/{key}", item)
            if len(page) < _PAGE_KEYS:
                return
            start_after = page[-1].object_name

    def delete(self, key: str, etag: str | None = None) -> bool:
        if etag is None:
            self._call(key, self._client.remove_object)
            return True
        found = self.stat(key)
        if found is not None and found.etag != etag:
            return False
        try:
            self._call(key, self._client.remove_unchanged, etag)
        except ObjectNotFoundError:
            return True
        except ObjectChangedError:
            return False
        return True

    def copy(self, key: str, to_key: str, etag: str | None = None) -> None:
        source = CopySource(*self._locate(key), match_etag=etag)
        to_bucket, to_name = self._locate(to_key)
        self._try(self.uri(key), self._client.copy_object, to_bucket, to_name, source)

    def touch(self, key: str) -> None:
        source = CopySource(*self._locate(key))
        mark = {"touched": str(time.time_ns())}  # S3 copies an object onto itself only with a change
        self._call(key, self._client.copy_object, source, metadata=mark, metadata_directive=REPLACE)

    def _page(self, bucket: str, prefix: str, after: str | None) -> "builtins.list[Object]":
        found = self._client.list_objects(bucket, prefix=prefix or None, recursive=True, start_after=after)
        return [item for item, _ in zip(found, range(_PAGE_KEYS), strict=False)]

    def _copy_to(self, key: str, file: IO[bytes], progress: Transferred | None) -> None:
        """Write the object to the file, continuing where a transfer broke off as long as the object is the same."""
        done, etag = 0, None

        def transfer(bucket: str, name: str) -> None:
            nonlocal done, etag
            headers: Any = {"If-Match": etag} if etag else None
            response = self._client.get_object(bucket, name, offset=done, request_headers=headers)
            try:
                etag = response.headers.get("ETag", etag)
                total = done + int(response.headers.get("Content-Length", 0))
                # read would drop what arrived before the connection broke.
                while chunk := response.read1(_CHUNK_BYTES):
                    file.write(chunk)
                    done += len(chunk)
                    if progress:
                        progress(done, total)
                if done < total:
                    raise IncompleteRead(done, total - done)
            finally:
                response.close()
                response.release_conn()

        self._call(key, transfer)

    def _join(self, key: str) -> str:
        return "/".join(part for part in (self._path, key) if part)

    def _locate(self, key: str, *, allow_empty: bool = False) -> tuple[str, str]:
        if any(part in (".", "..") for part in key.split("/")):
            raise ConfigError(
                f"Key {key!r} leaves the store's root {self.uri()}: use a key without '.' and '..' parts."
            )
        bucket, _, name = self._join(key).partition("/")
        if self._path and not key and name:
            name += "/"
        if not bucket or not (name or allow_empty):
            raise ConfigError(f"s3://{self._path}/{key} does not name an object: expected s3://bucket/key.")
        return bucket, name

    def _call(
        self, key: str, call: Callable[Concatenate[str, str, ...], T], *arguments: object, **options: object
    ) -> T:
        """What the call returns for the object's bucket and name, tried as `_try` does."""
        return self._try(self.uri(key), call, *self._locate(key), *arguments, **options)

    def _try(self, uri: str, call: Callable[..., T], *arguments: object, **options: object) -> T:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return call(*arguments, **options)
            except _FAULTS as error:
                if isinstance(error, S3Error) and error.code in _NOT_FOUND:
                    raise ObjectNotFoundError(f"{uri}: no such object.") from error
                if attempt == ATTEMPTS or not _is_transient(error):
                    raise _explained(error, f"{uri} at {self._connection.endpoint}", attempt) from error
                logger.warning("%s: %s; attempt %d of %d failed.", uri, type(error).__name__, attempt, ATTEMPTS)
                self._connection.sleep(min(0.2 * 2 ** (attempt - 1), 5.0))
        raise AssertionError("unreachable")


def _info(key: str, found: Object) -> ObjectInfo:
    if found.last_modified is None:
        raise StoreError(f"{key}: the server gave no time of change.")
    return ObjectInfo(key, found.size or 0, (found.etag or "").strip('"'), found.last_modified)


def _is_transient(error: Exception) -> bool:
    """Whether the same call may succeed in a moment."""
    if isinstance(error, S3Error):
        return error.code in _TRANSIENT_CODES
    if isinstance(error, ServerError):
        return error.status_code in (429, 500, 502, 503, 504)
    if isinstance(error, InvalidResponseError):
        # A proxy in front of the server answers in HTML; the status is in the message alone.
        return re.search(r"Response code: (429|5\d\d)\b", str(error)) is not None
    if isinstance(error, SSLError | ssl.SSLError | LocationParseError) or _is_of_this_disk(error):
        return False
    return isinstance(error, HTTPError | OSError)


def _is_of_this_disk(error: Exception) -> bool:
    return isinstance(error, OSError) and error.errno in _DISK_FAULTS


def _explained(error: Exception, place: str, attempts: int) -> StoreError:
    """The error with the object, the server and the next step."""
    if isinstance(error, S3Error) and error.code == "PreconditionFailed":
        # The new object can be read from its beginning.
        return ObjectChangedError(f"{place}: {_explanation(error, attempts)}", transient=True)
    return StoreError(f"{place}: {_explanation(error, attempts)}", transient=_is_transient(error))


def _explanation(error: Exception, attempts: int) -> str:
    if isinstance(error, S3Error):
        advice = _ADVICE.get(error.code or "", "See the server's log.")
        return f"{error.code}: {error.message}. {advice}"
    if isinstance(error, SSLError | ssl.SSLError):
        return (
            f"no secure connection ({error}). Set AWS_CA_BUNDLE to the server's certificate authority, or use "
            "http:// in AWS_ENDPOINT_URL where the server speaks no TLS."
        )
    if isinstance(error, InvalidResponseError):
        return (
            f"the answer is not from an S3 server ({error}). AWS_ENDPOINT_URL may name a web console or "
            "a proxy, or use http:// for a server that speaks TLS."
        )
    if _is_of_this_disk(error):
        return f"this machine's disk failed ({error}). Check free space and permissions."
    if isinstance(error, HTTPError | OSError):
        return (
            f"not reached in {attempts} attempts ({error}). Check that the server runs and that "
            "AWS_ENDPOINT_URL names its host and port."
        )
    return f"{error}. See the server's log."
