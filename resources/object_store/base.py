"""The common interface of folder and S3 object stores."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from resources.digests import sha256_bytes, sha256_file
from resources.errors import IntegrityError


@dataclass(frozen=True)
class ObjectInfo:
    """One object in a listing: key relative to the store's root, size in bytes, etag, modification time."""

    key: str
    size: int
    etag: str
    last_modified: datetime


class ObjectStore(ABC):
    """Objects under one root. Keys are relative to it, with forward slashes.

    Writes are atomic: a reader sees either the old object or the complete new one. Missing objects raise
    ObjectNotFoundError, store faults StoreError; both name the object's URI.
    """

    @abstractmethod
    def uri(self, key: str = "") -> str:
        """Absolute address that `open_store` understands."""

    @abstractmethod
    def at(self, prefix: str) -> "ObjectStore":
        """The same store rooted at a prefix. At the top of an S3 store the first segment is the bucket."""

    def bucket(self, name: str) -> "ObjectStore":
        """The bucket with this name, to which S3 stores may add a prefix."""
        return self.at(name)

    def read(self, key: str) -> bytes:
        with self.open(key) as file:
            return file.read()

    @abstractmethod
    def open(self, key: str) -> BinaryIO:
        """A stream over the object's bytes; the caller closes it."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None: ...

    @abstractmethod
    def create(self, key: str, data: bytes) -> None:
        """Write the object only where there is none yet; one that is there stays, and is not an error.

        It does not tell which of the two happened: after a lost answer S3's client finds its own object.
        """

    @abstractmethod
    def upload(self, key: str, path: Path) -> None: ...

    @abstractmethod
    def download(self, key: str, path: Path) -> None:
        """Write the object's content to a file, atomically; parent folders are created."""

    @abstractmethod
    def stat(self, key: str) -> ObjectInfo | None:
        """The object's info, or None if it does not exist."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects whose key starts with the prefix, in key order."""

    @abstractmethod
    def delete(self, key: str, etag: str | None = None) -> bool:
        """Remove the object; a missing one is not an error. With an etag, remove only an object that still has it.

        False if the object was replaced and is therefore kept.
        """

    @abstractmethod
    def copy(self, key: str, to_key: str, etag: str | None = None) -> None:
        """Copy the object to another key. With an etag, ObjectChangedError if the object has another one."""

    @abstractmethod
    def touch(self, key: str) -> None:
        """Set the modification time to now; the content is unchanged."""

    def exists(self, key: str) -> bool:
        return self.stat(key) is not None

    def local_path(self, key: str) -> Path | None:
        """The object's file if the store is a folder, so that it can be memory-mapped; otherwise None."""
        return None

    def read_verified(self, key: str, sha256: str) -> bytes:
        """The object's bytes; IntegrityError when they do not have the given digest."""
        data = self.read(key)
        if (found := sha256_bytes(data)) != sha256:
            raise self.changed(key, sha256, found)
        return data

    def download_verified(self, key: str, sha256: str, path: Path) -> None:
        """Like `download`; a file with another digest is removed and IntegrityError raised."""
        self.download(key, path)
        if (found := sha256_file(path)) != sha256:
            path.unlink()
            raise self.changed(key, sha256, found)

    def changed(self, key: str, expected: str, found: str) -> IntegrityError:
        """The error for an object that does not have its digest."""
        return IntegrityError(
            f"{self.uri(key)}: expected sha256 {expected}, got {found}. "
            "The object was changed or truncated after it was written: restore it, or materialize its asset again."
        )
