"""An object store in a folder, used on a laptop instead of MinIO."""

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from resources.errors import ConfigError, ObjectChangedError, ObjectNotFoundError, StoreError
from resources.object_store.base import ObjectInfo, ObjectStore

TEMPORARY_PREFIX = ".writing-"
"""Of the name of a file that is being written. One that a killed writer left is not an object."""


class FolderStore(ObjectStore):
    """Keys are paths below `root`. Writes go to a temporary file in the same folder and are renamed into place.

    A link to a file is an object, so that a dataset can be put into the landing zone with `ln -s`.
    """

    def __init__(self, root: Path):
        self.root = root.resolve()

    def uri(self, key: str = "") -> str:
        return (self.root / key).as_uri() + ("/" if key == "" or key.endswith("/") else "")

    def at(self, prefix: str) -> "FolderStore":
        return FolderStore(self._path(prefix.rstrip("/")))

    def local_path(self, key: str) -> Path | None:
        return self._path(key)

    def open(self, key: str) -> BinaryIO:
        try:
            return self._path(key).open("rb")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise ObjectNotFoundError(f"{self.uri(key)}: no such object.") from error
        except OSError as error:
            raise StoreError(f"Could not read {self._path(key)}: {error.strerror}. Check its permissions.") from error

    def write(self, key: str, data: bytes) -> None:
        write_atomically(self._target(key), lambda file: file.write(data))

    def create(self, key: str, data: bytes) -> None:
        write_atomically(self._target(key), lambda file: file.write(data), replace=False)

    def upload(self, key: str, path: Path) -> None:
        with path.open("rb") as source:
            write_atomically(self._target(key), lambda file: shutil.copyfileobj(source, file))

    def download(self, key: str, path: Path) -> None:
        with self.open(key) as source:
            write_atomically(path, lambda file: shutil.copyfileobj(source, file))

    def stat(self, key: str) -> ObjectInfo | None:
        path = self._path(key)
        return self._info(key, path) if path.is_file() else None

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        base = self._path(prefix.rpartition("/")[0])
        keys = (
            str(Path(folder, name).relative_to(self.root)).replace(os.sep, "/")
            for folder, _, names in os.walk(base)
            for name in names
            if not name.startswith(TEMPORARY_PREFIX)
        )
        for key in sorted(keys):
            if key.startswith(prefix):
                try:
                    yield self._info(key, self.root / key)
                except OSError as error:
                    # removed meanwhile, or a broken link
                    if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                        raise StoreError(f"Could not list {self.root / key}: {error.strerror}.") from error

    def delete(self, key: str, etag: str | None = None) -> bool:
        path = self._path(key)
        try:
            if etag is not None:
                return _remove_unchanged(path, etag)
            path.unlink(missing_ok=True)
        except NotADirectoryError:
            pass
        except OSError as error:
            raise StoreError(f"Could not remove {path}: {error.strerror}. Check its permissions.") from error
        return True

    def copy(self, key: str, to_key: str, etag: str | None = None) -> None:
        def fill(file: BinaryIO) -> None:
            shutil.copyfileobj(source, file)
            if etag is not None and _etag(os.fstat(source.fileno())) != etag:
                raise ObjectChangedError(f"{self.uri(key)} was replaced since it was checked.", transient=True)

        with self.open(key) as source:
            write_atomically(self._target(to_key), fill)

    def touch(self, key: str) -> None:
        with self.open(key):
            os.utime(self._path(key))

    def _target(self, key: str) -> Path:
        if not key or key.endswith("/"):
            raise ConfigError(f"Key {key!r} names a folder: expected an object's name after the last slash.")
        return self._path(key)

    def _path(self, key: str) -> Path:
        path = Path(os.path.normpath(self.root / key))
        if not path.is_relative_to(self.root):
            raise ConfigError(f"Key {key!r} leaves the store's root {self.root}: use a key without '..'.")
        return path

    def _info(self, key: str, path: Path) -> ObjectInfo:
        status = path.stat()
        return ObjectInfo(key, status.st_size, _etag(status), datetime.fromtimestamp(status.st_mtime, UTC))


def _etag(status: os.stat_result) -> str:
    tag = hashlib.sha256(f"{status.st_mtime_ns}:{status.st_size}:{status.st_ino}".encode())
    return tag.hexdigest()[:32]


def _remove_unchanged(path: Path, etag: str) -> bool:
    """Remove a file if it still has the etag.

    It is renamed first, so that the checked file is the one that is removed. If the process is killed here, the file
    remains an object under the other name.
    """
    aside = path.with_name(f"removing-{uuid.uuid4().hex}{path.suffix[:20]}")
    try:
        if _etag(path.stat()) != etag:
            return False
        path.rename(aside)
    except FileNotFoundError:
        return True
    unchanged = _etag(aside.stat()) == etag
    if not unchanged:
        with contextlib.suppress(FileExistsError):  # a newer one has taken its name
            os.link(aside, path, follow_symlinks=False)
    aside.unlink()
    return unchanged


def write_atomically(path: Path, fill: Callable[[BinaryIO], object], *, replace: bool = True) -> None:
    """Let `fill` write a temporary file next to the path and rename it into place; nothing is left when it fails.

    Without `replace` a file that exists stays. Raises StoreError when the disk refuses; this project's own errors pass
    through.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            if replace:
                os.replace(name, path)
                return
            with contextlib.suppress(FileExistsError):
                os.link(name, path)
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"Could not write {path}: {error}. Check free space and permissions.") from error
