"""Whether a file just put into a folder is whole. In S3 an object appears all at once; in a folder it grows."""

import gzip
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from cifar_assets.dataset.formats.image_tar import IMAGE_SUFFIXES
from cifar_assets.dataset.images import ImageError, prepare_image
from cifar_assets.dataset.layouts import suffix_of
from cifar_assets.object_store import ObjectInfo, ObjectStore

SETTLED_SECONDS = 60.0
"""A file untouched for this long is taken as it is: what is wrong with it then is for validation to say."""

_PARQUET_MAGIC = b"PAR1"
_CHUNK_BYTES = 1 << 20


def still_being_written(store: ObjectStore, info: ObjectInfo, now: Callable[[], float] = time.time) -> str | None:
    """Why the object looks unfinished, or None. Only files touched within SETTLED_SECONDS are opened."""
    path = store.local_path(info.key)
    if path is None or abs(now() - info.last_modified.timestamp()) > SETTLED_SECONDS:
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
    if suffix in IMAGE_SUFFIXES:
        return _decodes(path)
    return _gzip_ends(path)


def _decodes(path: Path) -> bool:
    try:
        prepare_image(path.read_bytes())
    except ImageError:
        return False
    return True


def _gzip_ends(path: Path) -> bool:
    """Reads to the checksum at the end: a cut-off file has none. What is no gzip at all is whole in its own way."""
    try:
        with gzip.open(path) as file:
            while file.read(_CHUNK_BYTES):
                pass
    except gzip.BadGzipFile:
        return True
    except (EOFError, zlib.error):
        return False
    return True
