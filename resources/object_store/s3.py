"""An object store in S3 (MinIO or any other compatible server)."""

import io
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO
from urllib.parse import quote, unquote

from minio.commonconfig import REPLACE, CopySource
from minio.datatypes import Object
from minio.error import InvalidResponseError, MinioException, S3Error
from urllib3.exceptions import HTTPError, SSLError

from resources.errors import BucketNotFoundError, ConfigError, ObjectChangedError, ObjectNotFoundError, StoreError
from resources.object_store.base import ObjectInfo, ObjectStore
from resources.object_store.folder import write_atomically
from resources.object_store.s3_settings import ATTEMPTS, OVERLOADED, S3Client, S3Connection

PART_BYTES = 16 << 20
_CHUNK_BYTES = 1 << 20
_NOT_FOUND = ("NoSuchKey", "NoSuchObject", "NotFound")
_KINDS = {"NoSuchBucket": BucketNotFoundError, "PreconditionFailed": ObjectChangedError}
_BUCKET_EXISTS = ("BucketAlreadyOwnedByYou", "BucketAlreadyExists")
_AGAIN_CODES = ("NoSuchUpload", "OperationAborted", "RequestTimeout", "ConditionalRequestConflict")
"""Error codes after which to store the object again. NoSuchUpload is the response to the client's second request to
complete an upload if the first one succeeded but its response was lost."""
_TRANSIENT_CODES = (*_AGAIN_CODES, "PreconditionFailed")
"""Transient error codes that the client does not retry. A replaced object can be read from its beginning."""
_ADVICE = {
    "AccessDenied": "The credentials are known but not allowed to do this: check the policy of AWS_ACCESS_KEY_ID.",
    **dict.fromkeys(
        ("InvalidAccessKeyId", "XAdminUserNotFound"),  # the second one is versitygw's
        "AWS_ACCESS_KEY_ID is not known to this server: check it, and the endpoint.",
    ),
    "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID: check it for a typo or a "
    "trailing line break.",
    **dict.fromkeys(
        ("ExpiredToken", "InvalidToken", "InvalidTokenId"),
        "AWS_SESSION_TOKEN is missing, expired, or belongs to other keys: renew all three.",
    ),
    "RequestTimeTooSkewed": "The clocks of this machine and of the server differ by over 15 minutes: correct them.",
    "NoSuchBucket": "The bucket does not exist: create it, or correct the name in the s3:// address.",
    "InvalidBucketName": "The bucket's name is not allowed: 3 to 63 lowercase letters, digits, dots and hyphens.",
    "PreconditionFailed": "The object was replaced while it was being read: read it again.",
    "XMinioStorageFull": "The server's disk is full: free some space.",
    "BadRequest": "The server may expect TLS: if so, use https:// in AWS_ENDPOINT_URL.",
    "AuthorizationHeaderMalformed": "The server expects another region: set AWS_REGION to the one in the message.",
}


class S3Store(ObjectStore):
    """Objects of one bucket below a prefix or, without a root, a store whose keys start with a bucket's name.

    The client retries if a connection fails or a server is overloaded; an interrupted download is resumed.
    """

    def __init__(self, connection: S3Connection, path: str = "", client: S3Client | None = None):
        self._connection = connection
        self._client = client or connection.client()
        self._path = path.strip("/")

    @classmethod
    def from_environment(cls, path: str = "") -> "S3Store":
        """The store rooted at `bucket/prefix` on the server that the AWS_... variables describe; not connected yet."""
        return cls(S3Connection.from_environment(), unquote(path))

    def bucket(self, name: str) -> "S3Store":
        return self.at(self._connection.bucket_prefix + name)

    def uri(self, key: str = "") -> str:
        tail = "" if key else "/"
        return f"s3://{quote(self._join(key))}{tail}".replace("s3:////", "s3:///")

    def at(self, prefix: str) -> "S3Store":
        return S3Store(self._connection, self._join(prefix.strip("/")), self._client)

    def ensure_buckets(self, names: Iterable[str]) -> None:
        """Create the buckets that do not exist yet. Another process may create the same one concurrently."""
        for name in names:
            with self._explaining(name):
                try:
                    if not self._client.bucket_exists(name):
                        self._client.make_bucket(name)
                except S3Error as error:
                    if error.code not in _BUCKET_EXISTS:
                        raise

    def open(self, key: str) -> BinaryIO:
        # Spooled through the resumable download: the caller cannot restart an interrupted stream.
        file = tempfile.SpooledTemporaryFile(max_size=PART_BYTES)  # noqa: SIM115
        try:
            self._copy_to(key, file)
        except BaseException:
            file.close()
            raise
        file.seek(0)
        return file  # pyright: ignore[reportReturnType]  (a binary file in all but its declared type)

    def write(self, key: str, data: bytes) -> None:
        self._store(key, lambda bucket, name: self._client.put_object(bucket, name, io.BytesIO(data), len(data)))

    def create(self, key: str, data: bytes) -> None:
        with suppress(ObjectChangedError):
            self._store(key, lambda bucket, name: self._client.put_new(bucket, name, data))

    def upload(self, key: str, path: Path) -> None:
        self._store(key, lambda bucket, name: self._client.fput_object(bucket, name, str(path), part_size=PART_BYTES))

    def download(self, key: str, path: Path) -> None:
        write_atomically(path, lambda file: self._copy_to(key, file))

    def stat(self, key: str) -> ObjectInfo | None:
        try:
            with self._located(key) as place:
                return _info(key, self._client.stat_object(*place))
        except ObjectNotFoundError:
            return None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        bucket, name = self._locate(prefix, allow_empty=True)
        root = self._path.partition("/")[2]
        skip = len(root) + 1 if root else 0
        with self._explaining(prefix):
            for item in self._client.list_objects(bucket, prefix=name or None, recursive=True):
                key = str(item.object_name)
                yield _info(key[skip:] if self._path else f"{bucket}/{key}", item)

    def delete(self, key: str, etag: str | None = None) -> bool:
        if etag is None:
            with self._located(key) as place:
                self._client.remove_object(*place)
            return True
        found = self.stat(key)
        if found is None:
            return True
        if found.etag != etag:
            return False
        try:
            with self._located(key) as place:
                self._client.remove_unchanged(*place, etag)
        except ObjectNotFoundError:
            return True
        except ObjectChangedError:
            return False
        return True

    def copy(self, key: str, to_key: str, etag: str | None = None) -> None:
        with self._located(key) as place:
            self._client.copy_object(*self._locate(to_key), CopySource(*place, match_etag=etag))

    def touch(self, key: str) -> None:
        mark: dict[str, Any] = {
            "touched": str(time.time_ns())
        }  # S3 copies an object onto itself only if something changes
        with self._located(key) as place:
            self._client.copy_object(*place, CopySource(*place), metadata=mark, metadata_directive=REPLACE)

    def _store(self, key: str, call: Callable[[str, str], object]) -> None:
        """Make a call that stores the object; repeat the whole call after a transient error."""
        with self._located(key) as place:
            for attempt in range(ATTEMPTS):
                try:
                    call(*place)
                    return
                except S3Error as error:
                    if error.code not in _AGAIN_CODES or attempt == ATTEMPTS - 1:
                        raise
                time.sleep(self._connection.pause_seconds * 2**attempt)

    def _copy_to(self, key: str, file: IO[bytes]) -> None:
        """Write the object to the file, resuming an interrupted transfer as long as the object is unchanged."""
        done, etag, attempts_left = 0, "", ATTEMPTS
        with self._located(key) as place:
            while True:
                headers: dict[str, Any] = {"If-Match": etag} if etag else {}
                response = self._client.get_object(*place, offset=done, request_headers=headers)
                etag = response.headers.get("ETag", etag)
                try:
                    # read would drop the data that arrived before the connection broke
                    while chunk := response.read1(_CHUNK_BYTES):
                        file.write(chunk)
                        done += len(chunk)
                    return
                except HTTPError:
                    attempts_left -= 1
                    if not attempts_left:
                        raise
                finally:
                    response.close()
                    response.release_conn()

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

    @contextmanager
    def _located(self, key: str) -> Iterator[tuple[str, str]]:
        """The object's bucket and name, for a request with explained errors."""
        place = self._locate(key)
        with self._explaining(key):
            yield place

    @contextmanager
    def _explaining(self, key: str) -> Iterator[None]:
        """Raises the client's errors as StoreError, with the object, the server and the next step."""
        place = f"{self.uri(key)} at {self._connection.endpoint_url}"
        try:
            yield
        except S3Error as error:
            if error.code in _NOT_FOUND:
                raise ObjectNotFoundError(f"{self.uri(key)}: no such object.") from error
            kind = _KINDS.get(error.code or "", StoreError)
            advice = _ADVICE.get(error.code or "", "See the server's log.")
            text = f"{place}: {error.code}: {error.message}. {advice}"
            raise kind(text, transient=error.code in _TRANSIENT_CODES or _is_overloaded(error)) from error
        except (HTTPError, MinioException) as error:
            insecure = isinstance(getattr(error, "reason", None), SSLError)
            raise StoreError(
                f"{place}: no response from an S3 server in {ATTEMPTS} attempts ({error}). Check that it is running, "
                "that AWS_ENDPOINT_URL has its scheme, host and port and is not a web console, and for https:// that "
                "AWS_CA_BUNDLE has its certificate authority.",
                transient=(isinstance(error, HTTPError) and not insecure) or _is_overloaded(error),
            ) from error
        except OSError as error:
            raise StoreError(
                f"{place}: this machine's disk failed ({error}). Check free space and permissions."
            ) from error


def _is_overloaded(error: Exception) -> bool:
    """Whether the server, or a proxy in front of it, responds that it is unavailable."""
    if isinstance(error, InvalidResponseError):
        return (
            re.search(r"Response code: (429|5\d\d)\b", str(error)) is not None
        )  # the status is available nowhere else
    status = error.response.status if isinstance(error, S3Error) else getattr(error, "status_code", 0)
    return status in OVERLOADED


def _info(key: str, found: Object) -> ObjectInfo:
    if found.last_modified is None:
        raise StoreError(f"{key}: the server returned no modification time.")
    return ObjectInfo(key, found.size or 0, (found.etag or "").strip('"'), found.last_modified)
