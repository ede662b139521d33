"""Whether a file just put into a folder is whole. In S3 an object appears all at once; in a folder it grows."""

import gzip
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cifar_assets.contracts import LANDING_PREFIX
from cifar_assets.dataset.formats.images import (
    ImageError,
    ImageTooLargeError,
    check_size,
    open_picture,
)
from cifar_assets.dataset.formats.names import PICTURE_SUFFIXES, suffix_of
from resources.object_store import ObjectInfo, ObjectStore

SETTLED_SECONDS = 60.0
"""A file untouched for this long is taken as it is: what is wrong with it then is for validation to say."""

_PARQUET_MAGIC = b"PAR1"
_TAR_MAGIC, _TAR_MAGIC_AT = b"ustar", 257
_TAR_END_BYTES = 1024
_JPEG_END = b"\xff\xd9"
_CHUNK_BYTES = 1 << 20


@dataclass
class Budget:
    """Bytes that one look at the landing zone may unpack. A gzip file may hold a thousand times its size."""

    num_bytes: int = 256 << 20


def unlisted(store: ObjectStore) -> dict[str, str]:
    """Why parts of a landing zone that is a folder are not among its objects, by key."""
    root = store.local_path("")
    reasons: dict[str, str] = {}

    def refuse(path: Path, reason: str) -> None:
        key = path.relative_to(root or path).as_posix()
        reasons[key.encode(errors="backslashreplace").decode()] = reason

    if root is not None and (root / LANDING_PREFIX).is_dir():
        for folder, folders, files in os.walk(
            root / LANDING_PREFIX, onerror=lambda error: refuse(Path(error.filename), f"not readable: {error.strerror}")
        ):
            for path in (Path(folder, name) for name in (*folders, *files)):
                if path.is_symlink() and path.is_dir():
                    refuse(path, "a link to a folder: copy the folder, or link its files")
                elif path.is_symlink() and not path.exists():
                    refuse(path, "a link that leads nowhere")
    return reasons


def why_not_ready(
    store: ObjectStore, info: ObjectInfo, budget: Budget, now: Callable[[], float] = time.time
) -> str | None:
    """Why a landed file cannot be read yet, or None. Only files touched within SETTLED_SECONDS are opened."""
    path = store.local_path(info.key)
    if path is None:
        return None
    if not os.access(path, os.R_OK):
        return "not readable: give this process's user permission to read it"
    if abs(now() - info.last_modified.timestamp()) > SETTLED_SECONDS:
        return None
    try:
        whole = _is_whole(path, budget)
    except OSError:
        whole = False
    return None if whole else "still being written"


def _is_whole(path: Path, budget: Budget) -> bool:
    suffix = suffix_of(path.name)
    if suffix == ".parquet":
        with path.open("rb") as file:
            file.seek(-min(len(_PARQUET_MAGIC), path.stat().st_size), 2)
            return file.read() == _PARQUET_MAGIC
    if suffix in PICTURE_SUFFIXES:
        return _picture_ends(path)
    return _archive_ends(path, budget)


def _picture_ends(path: Path) -> bool:
    """Looks at the structure only: decoding is for the process that validates."""
    try:
        check_size(path.stat().st_size)
        picture = open_picture(path.read_bytes())
    except ImageTooLargeError:
        return True  # for validation to refuse
    except ImageError:
        return False
    return not picture.essence.startswith(_JPEG_END[:1]) or picture.essence.endswith(_JPEG_END)


def _archive_ends(path: Path, budget: Budget) -> bool:
    """Looks for what a cut-off file lacks: gzip's checksum, tar's two empty blocks. Any other file counts as whole."""
    with path.open("rb") as file:
        if file.read(_TAR_MAGIC_AT + len(_TAR_MAGIC))[_TAR_MAGIC_AT:] == _TAR_MAGIC:
            file.seek(-min(_TAR_END_BYTES, path.stat().st_size), os.SEEK_END)
            return not any(file.read())
    try:
        with gzip.open(path) as file:
            while data := file.read(_CHUNK_BYTES):
                budget.num_bytes -= len(data)
                if budget.num_bytes < 0:
                    return False
    except gzip.BadGzipFile:
        return True
    except (EOFError, zlib.error):
        return False
    return True
