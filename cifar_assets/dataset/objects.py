"""Raw objects, which make up a raw version, and reading their rows from verified bytes."""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cifar_assets.dataset.formats.archive import parse_records, pixel_batches, read_archive
from cifar_assets.dataset.formats.encoded import read_encoded
from cifar_assets.dataset.formats.rows import SPLITS, Preparation, RowBatch, Split
from resources.digests import sha256_file
from resources.errors import DataError, IntegrityError, ObjectNotFoundError
from resources.object_store import ObjectStore

ObjectFormat = Literal["archive", "parquet", "images", "picture", "records"]
"""Official archive (python or binary), Parquet in the Hugging Face layout, tar of image files, one, binary records."""

LINKED_FOLDER = "a link to a folder: copy the folder, or link its files"
UNREADABLE_FOLDER = "not readable"
OBJECTS_PREFIX = "objects/"

YOUNG = timedelta(hours=12)
"""An object's timestamp is not refreshed on use if it was written or refreshed within this time."""

GROUP_ROWS = 64
"""Largest number of rows in a group, and so of rows that are rewritten when one image is added."""

State = TypeVar("State", bound=BaseModel)
T = TypeVar("T")


class RawObject(BaseModel):
    """One stored object of a raw version and which of its rows count."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str = Field(description="Key in the raw bucket: objects/<sha256><suffix>.")
    sha256: str
    size: int = Field(description="Bytes.")
    format: ObjectFormat
    role: Literal["source", "landed"] = Field(description="Part of the source, or joined from the landing zone.")
    split: Split | Literal["mixed"] = Field(
        description="Split of all its rows; mixed for an archive, any where the source has no split of its own."
    )
    rows: int = Field(description="Rows in the object, whether used or not.")
    excluded: tuple[tuple[int, int], ...] = Field(
        default=(), description="Row ranges (first, one past the last) that this version does not use."
    )

    @property
    def used_rows(self) -> int:
        return self.rows - sum(stop - start for start, stop in self.excluded)

    def used(self) -> NDArray[np.bool_]:
        """One flag per row: whether this version uses it."""
        flags = np.ones(self.rows, dtype=np.bool_)
        for start, stop in self.excluded:
            flags[start:stop] = False
        return flags


def ranges_of(rows: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """The row numbers as ranges (first, one past the last), in order."""
    ranges: list[tuple[int, int]] = []
    for row in sorted(set(rows)):
        if ranges and ranges[-1][1] == row:
            ranges[-1] = (ranges[-1][0], row + 1)
        else:
            ranges.append((row, row + 1))
    return tuple(ranges)


def grouped(items: Sequence[T], digest: Callable[[T], str], rows: Callable[[T], int]) -> list[list[T]]:
    """Small items in groups of up to GROUP_ROWS rows that share one stored object, in the order of their sha256.

    A group holds the items whose digests share a prefix of bits that is just long enough. The groups are therefore a
    function of the set of items, and adding or removing an item changes only its own group.
    """

    def split(part: list[T], bit: int) -> list[list[T]]:
        if len(part) < 2 or bit == 256 or sum(rows(item) for item in part) <= GROUP_ROWS:
            return [part] if part else []
        halves: tuple[list[T], list[T]] = ([], [])
        for item in part:
            halves[int(digest(item)[bit // 4], 16) >> (3 - bit % 4) & 1].append(item)
        return split(halves[0], bit + 1) + split(halves[1], bit + 1)

    return split(sorted(items, key=digest), 0)


def read_rows(
    path: Path, kind: ObjectFormat, split: str, name: str, how: Preparation, *, unread: dict[str, str] | None = None
) -> Iterator[RowBatch]:
    """The rows of a file in one of the formats; `name` is its name in errors, `unread` receives what is skipped."""
    if kind == "archive":
        return read_archive(path, name, how, unread)
    only = cast(Split, split) if split in SPLITS else "train"
    if kind == "records":
        return pixel_batches(*parse_records(path.read_bytes(), name), only, how)
    return read_encoded(path, kind, only, name, how)


@contextmanager
def fetched(store: ObjectStore, key: str, sha256: str) -> Iterator[Path]:
    """The object as a local file with verified content: in place where the store is a folder, else a temporary copy."""
    local = store.local_path(key)
    if local is not None and local.is_file():
        if (found := sha256_file(local)) != sha256:
            raise store.changed(key, sha256, found)
        yield local
        return
    with tempfile.TemporaryDirectory(prefix="cifar-object-") as folder:
        path = Path(folder, os.path.basename(key))
        store.download_verified(key, sha256, path)
        yield path


def store_object(store: ObjectStore, path: Path, sha256: str, suffix: str, prefix: str = OBJECTS_PREFIX) -> str:
    """Store a file under its digest and return the key. An intact stored copy is kept, a damaged one replaced."""
    key = f"{prefix}{sha256}{suffix}"
    if is_stored(store, key, sha256, path.stat().st_size):
        return key
    store.upload(key, path)
    if not is_stored(store, key, sha256, path.stat().st_size):
        store.delete(key)
        raise DataError(f"{path} changed while it was being stored; wait until it is complete and try again.")
    return key


def is_present(store: ObjectStore, key: str, size: int) -> bool:
    """Whether an object of that size exists. StoreError when the store does not respond.

    Called before an object of an earlier version is used in a new one. Refreshes its timestamp, because pruning keeps
    recent objects.
    """
    info = store.stat(key)
    if info is None or info.size != size:
        return False
    if datetime.now(UTC) - info.last_modified > YOUNG:
        store.touch(key)
    return True


def is_stored(store: ObjectStore, key: str, sha256: str, size: int) -> bool:
    """Like `is_present`, and whether it has the right content."""
    try:
        if not is_present(store, key, size):
            return False
        with fetched(store, key, sha256):
            return True
    except (IntegrityError, ObjectNotFoundError):
        return False


def read_state(store: ObjectStore, key: str, kind: type[State]) -> State | None:
    """The note stored under the key, or None if there is none that this release can read."""
    try:
        return kind.model_validate_json(store.read(key))
    except (ObjectNotFoundError, ValidationError):
        return None


def printable(key: str) -> str:
    """A key that is safe for messages and JSON: the file system may have names that are not UTF-8."""
    return key.encode(errors="backslashreplace").decode()


def unlisted(store: ObjectStore, prefix: str) -> dict[str, str]:
    """Paths below a prefix of a folder store that are not listed as objects or cannot be read, with the reason."""
    root = store.local_path("")
    if root is None:
        return {}
    reasons: dict[Path, str] = {}

    def unreadable(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            reasons[Path(error.filename)] = f"{UNREADABLE_FOLDER}: {error.strerror}"

    for folder, folders, files in os.walk(root / prefix, onerror=unreadable):
        for path in (Path(folder, name) for name in (*folders, *files)):
            if path.is_symlink() and path.is_dir():
                reasons[path] = LINKED_FOLDER
            elif not (path.is_file() or path.is_dir()):
                reasons[path] = "a broken link" if path.is_symlink() else "not a file"
            elif path.is_file() and printable(str(path)) != str(path):
                reasons[path] = "its name is not UTF-8"
    return {printable(path.relative_to(root).as_posix()): reason for path, reason in reasons.items()}
