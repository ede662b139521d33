"""The state of the landing zone: which objects are ready to be read, and what the last build recorded about them."""

import os
import time
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel

from cifar_assets.contracts import LANDING_PREFIX
from cifar_assets.dataset.formats.names import ARCHIVE_SUFFIXES, PICTURE_SUFFIXES, suffix_of
from cifar_assets.dataset.objects import RawObject, printable, read_state, unlisted
from resources.digests import sha256_json
from resources.object_store import ObjectInfo, ObjectStore

RECORD_KEY = "landing-read.json"

SETTLED_SECONDS = 60.0
"""A file in a folder is read only after it has not been modified for this long. In S3, objects appear atomically."""

_UNFINISHED_SUFFIXES = (".part", ".partial", ".tmp", ".temp", ".crdownload", ".filepart", ".download", ".swp", "~")
_EXPECTED = "a .parquet file, an official archive (.tar.gz), or images in class folders"


@dataclass(frozen=True)
class LandingScan:
    """The landing zone's objects, classified by name, size and age only."""

    ready: tuple[ObjectInfo, ...]
    skipped: dict[str, str]
    """Why an object is skipped, by key."""


class Seen(BaseModel):
    """The content of a landed object: a table stored under its digest, or one image with this pixel digest."""

    sha256: str
    table: RawObject | None = None
    pixels: str = ""


class LandingRecord(BaseModel):
    """What the last build of the raw dataset read, for the landing sensor and to avoid reading it again."""

    version: Literal[1] = 1
    read: frozenset[str] = frozenset()
    """Fingerprints of the objects that were read."""
    preparation: str = ""
    """How images were prepared: `seen` is valid only for this preparation."""
    seen: dict[str, Seen] = {}
    """By fingerprint."""
    packs: dict[str, RawObject] = {}
    """Objects that images were packed into, by the digest of their names."""

    @classmethod
    def load(cls, raw: ObjectStore) -> "LandingRecord | None":
        """The stored record, or None if there is none that this release can read."""
        return read_state(raw, RECORD_KEY, cls)

    def save(self, raw: ObjectStore) -> None:
        """Replace the record."""
        raw.write(RECORD_KEY, self.model_dump_json().encode())


def fingerprint(info: ObjectInfo) -> str:
    """Identity of one state of an object, without timestamps: stores disagree on them."""
    return sha256_json([info.key, info.etag, info.size])[:16]


def scan_landing(raw: ObjectStore) -> LandingScan:
    """List the landing zone and skip what is not ready. Reads no object."""
    ready, skipped = [], unlisted(raw, LANDING_PREFIX)
    for info in raw.list(LANDING_PREFIX):
        if reason := classify_landing_object(info.key, info.size) or _why_not_ready(raw, info):
            skipped[printable(info.key)] = reason
        else:
            ready.append(info)
    return LandingScan(tuple(ready), skipped)


def classify_landing_object(key: str, size: int) -> str | None:
    """Why an object under `landing/` is not data to be read, or None when it is to be validated."""
    name = key.removeprefix(LANDING_PREFIX)
    base, suffix = name.rpartition("/")[2], suffix_of(name)
    is_picture = suffix in PICTURE_SUFFIXES
    reasons = {
        "its name is not UTF-8": key != key.encode(errors="replace").decode(),
        "a folder marker": not base,
        "a hidden or placeholder file": any(part.startswith(".") for part in name.split("/")),
        "an unfinished upload": base.lower().endswith(_UNFINISHED_SUFFIXES),
        "empty (0 bytes)": size == 0,
        f"not a supported kind of data: expected {_EXPECTED}": not is_picture
        and suffix not in (*ARCHIVE_SUFFIXES, ".parquet"),
        f"an image outside a class folder: put it under {LANDING_PREFIX}<class>/": is_picture and "/" not in name,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _why_not_ready(store: ObjectStore, info: ObjectInfo) -> str | None:
    path = store.local_path(info.key)
    if path is None:
        return None
    if not os.access(path, os.R_OK):
        return "not readable: give this process's user permission to read it"
    if abs(time.time() - info.last_modified.timestamp()) <= SETTLED_SECONDS:
        return f"waiting until it has not been modified for {SETTLED_SECONDS:.0f} seconds"
    return None
