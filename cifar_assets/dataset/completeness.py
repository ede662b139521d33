"""Whether a file just put into a folder is whole. In S3 an object appears all at once; in a folder it grows."""

import gzip
import os
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from cifar_assets.dataset.images import PICTURE_SUFFIXES, ImageError, check_size, prepare_image
from cifar_assets.dataset.layouts import suffix_of
from cifar_assets.object_store import ObjectInfo, ObjectStore

SETTLED_SECONDS = 60.0
"""A file untouched for this long is taken as it is: what is wrong with it then is for validation to say."""

_PARQUET_MAGIC = b"PAR1"
_TAR_MAGIC, _TAR_MAGIC_AT = b"ustar", 257
_TAR_END_BYTES = 1024
_CHUNK_BYTES = 1 << 20


def why_not_ready(store: ObjectStore, info: ObjectInfo, now: Callable[[], float] = time.time) -> str | None:
    """Why a landed file cannot be read yet, or None. Only files touched within SETTLED_SECONDS are opened."""
    path = store.local_path(info.key)
    if path is None:
        return None
    if not os.access(path, os.R_OK):
        return "not readable: give this process's user permission to read it"
    if abs(now() - info.last_modified.timestamp()) > SETTLED_SECONDS:
        return None
    try:
        whole = _is_whole(path)
    except OSError:
        whole = False
    return None if whole else "still being written"


def _is_whole(path: Path) -> bool:
    suffix = suffix_of(path.name)
    if suffix == ".parquet":
        with path.open("rb") as file:
            file.seek(-min(len(_PARQUET_MAGIC), path.stat().st_size), 2)
            return file.read() == _PARQUET_MAGIC
    if suffix in PICTURE_SUFFIXES:
        return _decodes(path)
    return _archive_ends(path)


def _decodes(path: Path) -> bool:
    try:
        check_size(path.stat().st_size)
    except ImageError:
        return True  # for validation to refuse, without reading it
    try:
        prepare_image(path.read_bytes())
    except ImageError:
        return False
    return True


def _archive_ends(path: Path) -> bool:
    """Looks for what a cut-off file lacks: gzip's checksum, tar's two empty blocks. Any other file counts as whole."""
    with path.open("rb") as file:
        if file.read(_TAR_MAGIC_AT + len(_TAR_MAGIC))[_TAR_MAGIC_AT:] == _TAR_MAGIC:
            file.seek(-min(_TAR_END_BYTES, path.stat().st_size), os.SEEK_END)
            return not any(file.read())
    try:
        with gzip.open(path) as file:
            while file.read(_CHUNK_BYTES):
                pass
    except gzip.BadGzipFile:
        return True
    except (EOFError, zlib.error):
        return False
    return True
