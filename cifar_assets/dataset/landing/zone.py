"""The landing zone as it lies: which objects are ready to be read, and which of them the last build read."""

import gzip
import os
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from cifar_assets.contracts import CLASSES, LANDING_PREFIX
from cifar_assets.dataset.formats.images import ImageError, ImageTooLargeError, check_size, open_picture
from cifar_assets.dataset.formats.names import ARCHIVE_SUFFIXES, PICTURE_SUFFIXES, class_of, suffix_of
from cifar_assets.dataset.objects import printable, read_state, unlisted
from resources.digests import canonical_json, sha256_json
from resources.object_store import ObjectInfo, ObjectStore

RECORD_KEY = "landing-read.json"

SETTLED_SECONDS = 60.0
"""A file untouched for this long is taken as it is: validation then says what is wrong with it."""

_UNFINISHED_SUFFIXES = (".part", ".partial", ".tmp", ".temp", ".crdownload", ".filepart", ".download", ".swp", "~")
_EXPECTED = "a .parquet file, an official archive (.tar.gz), or images in class folders"
_PARQUET_MAGIC = b"PAR1"
_TAR_MAGIC, _TAR_MAGIC_AT = b"ustar", 257
_TAR_END_BYTES = 1024
_JPEG_END = b"\xff\xd9"
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class LandingScan:
    """What lies in the landing zone, by name and size alone."""

    ready: tuple[ObjectInfo, ...]
    skipped: dict[str, str]
    """Why an object is skipped, by key."""


@dataclass
class Budget:
    """Bytes that one scan may unpack. A gzip file may hold a thousand times its size."""

    num_bytes: int = 256 << 20


class LandingRecord(BaseModel):
    """Fingerprints of the objects that the last build of the raw dataset read."""

    version: Literal[1] = 1
    read: frozenset[str]


def fingerprint(info: ObjectInfo) -> str:
    """Identity of one state of an object. Time stamps are left out: stores disagree on them."""
    return sha256_json([info.key, info.etag, info.size])[:16]


def write_record(raw: ObjectStore, infos: Iterable[ObjectInfo]) -> None:
    """Note the objects that a build has read, for the sensor that requests the next one."""
    raw.write(RECORD_KEY, canonical_json({"version": 1, "read": sorted(fingerprint(info) for info in infos)}))


def read_record(raw: ObjectStore) -> frozenset[str] | None:
    """Fingerprints of what the last build read; None without a record that this release understands."""
    record = read_state(raw, RECORD_KEY, LandingRecord)
    return record.read if record else None


def scan_landing(raw: ObjectStore) -> LandingScan:
    """List the landing zone and skip what is not ready. Cheap: one listing, and a look at files just written."""
    ready: list[ObjectInfo] = []
    skipped, budget = unlisted(raw, LANDING_PREFIX), Budget()
    for info in raw.list(LANDING_PREFIX):
        reason = classify_landing_object(info.key, info.size) or _why_not_ready(raw, info, budget)
        if reason is None:
            ready.append(info)
        else:
            skipped[printable(info.key)] = reason
    return LandingScan(tuple(ready), skipped)


def classify_landing_object(key: str, size: int) -> str | None:
    """Why an object under `landing/` is not data to be read, or None when it is to be validated. Reads nothing."""
    name = key.removeprefix(LANDING_PREFIX)
    base = name.rpartition("/")[2]
    if not base:
        return "a folder marker" if size == 0 else f"has no name: expected {_EXPECTED}"
    if key != key.encode(errors="replace").decode():
        return "its name is not UTF-8"
    if any(part.startswith(".") for part in name.split("/")):
        return "a hidden or placeholder file"
    if base.lower().endswith(_UNFINISHED_SUFFIXES):
        return "an unfinished upload"
    if size == 0:
        return "empty (0 bytes)"
    if suffix_of(base) in (*ARCHIVE_SUFFIXES, ".parquet"):
        return None
    if suffix_of(base) not in PICTURE_SUFFIXES:
        return f"not a kind of data that is read here: expected {_EXPECTED}"
    if class_of(name) is None:
        return (
            f"an image outside a class folder: put it under {LANDING_PREFIX}<class>/, class one of {', '.join(CLASSES)}"
        )
    return None


def _why_not_ready(store: ObjectStore, info: ObjectInfo, budget: Budget) -> str | None:
    """Why a landed file cannot be read yet, or None. In S3 an object appears all at once; in a folder it grows."""
    path = store.local_path(info.key)
    if path is None:
        return None
    if not os.access(path, os.R_OK):
        return "not readable: give this process's user permission to read it"
    if abs(time.time() - info.last_modified.timestamp()) > SETTLED_SECONDS:
        return None
    try:
        whole = _is_whole(path, budget)
    except OSError:
        whole = False
    return None if whole else "still being written"


def _is_whole(path: Path, budget: Budget) -> bool:
    """Looks for what a cut-off file lacks, such as gzip's checksum. Any other file counts as whole."""
    suffix = suffix_of(path.name)
    if suffix in PICTURE_SUFFIXES:
        return _is_whole_picture(path)
    with path.open("rb") as file:
        size = path.stat().st_size
        if suffix == ".parquet":
            file.seek(-min(len(_PARQUET_MAGIC), size), os.SEEK_END)
            return file.read() == _PARQUET_MAGIC
        if file.read(_TAR_MAGIC_AT + len(_TAR_MAGIC))[_TAR_MAGIC_AT:] == _TAR_MAGIC:
            file.seek(-min(_TAR_END_BYTES, size), os.SEEK_END)
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


def _is_whole_picture(path: Path) -> bool:
    """Looks at the structure only: decoding is for the process that validates."""
    try:
        check_size(path.stat().st_size)
        picture = open_picture(path.read_bytes())
    except ImageTooLargeError:
        return True  # for validation to refuse
    except ImageError:
        return False
    return not picture.essence.startswith(_JPEG_END[:1]) or picture.essence.endswith(_JPEG_END)
