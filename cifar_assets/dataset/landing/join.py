"""Joining what landed: each object is examined, checked against the images in use, and joined or rejected.

An object that did not change since the last build is not read again: `landing-memory.json` has its digest, and the
index kept under that digest has the rest. Single images are packed a few dozen to an object, so that one more image
makes one small pack to write again, not all.
"""

import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, Field

from cifar_assets.contracts import CLASSES, LANDING_PREFIX
from cifar_assets.dataset import progress
from cifar_assets.dataset.consistency import Known, check_landed
from cifar_assets.dataset.formats.encoded import pack_images
from cifar_assets.dataset.formats.images import check_size
from cifar_assets.dataset.formats.isolated import ReaderFailedError, ask
from cifar_assets.dataset.formats.names import ARCHIVE_SUFFIXES, PICTURE_SUFFIXES, class_of, is_test, suffix_of
from cifar_assets.dataset.formats.pickles import HostileDataError
from cifar_assets.dataset.formats.rows import SPLITS
from cifar_assets.dataset.index import PREPARATION, ObjectIndex, load_index, read_index, save_index
from cifar_assets.dataset.landing.rejection import Rejection, reject_object, reject_rows
from cifar_assets.dataset.landing.zone import scan_landing
from cifar_assets.dataset.objects import (
    OBJECTS_PREFIX,
    ObjectFormat,
    RawObject,
    grouped,
    is_present,
    is_stored,
    ranges_of,
    read_state,
    store_object,
)
from resources.digests import sha256_file, sha256_json, sha256_stream
from resources.errors import DataError, IntegrityError, ObjectChangedError, ObjectNotFoundError
from resources.object_store import ObjectInfo, ObjectStore

PACKS_PREFIX = "packs/"
_MEMORY_KEY = "landing-memory.json"


@dataclass(frozen=True)
class Unusable:
    """An object that is refused, or not judged this time: gone, changing, or more than a reader can take."""

    reason: str
    refused: str | None = None
    """The sha256 of a refused object."""
    hostile: bool = False
    reader_failed: bool = False


@dataclass(frozen=True)
class Landed:
    """An object that could be read."""

    key: str
    sha256: str
    index: ObjectIndex
    table: RawObject | None = None
    """A Parquet file or archive, stored under its digest; None for one image, which is packed with others."""

    @property
    def identity(self) -> tuple[bool, str, str]:
        """The same for copies under other names, as long as these say the same about it. Its order is the version's."""
        about = self.table.split if self.table else f"{self.index.labels[0]}:{SPLITS[self.index.splits[0]]}"
        return self.table is None, self.sha256, about

    @property
    def member(self) -> str:
        """The name of an image in its pack, free of the name it landed under."""
        return f"{CLASSES[self.index.labels[0]]}/{self.sha256}"


@dataclass
class LandingReport:
    """What became of the landing zone's objects, by key in the raw bucket."""

    accepted: dict[str, int] = field(default_factory=dict)
    """Rows that joined the version."""
    duplicates: dict[str, int] = field(default_factory=dict)
    """Rows not used because the same pixels are in the version already. They stay where they are."""
    rejected: list[Rejection] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    unread: int = 0
    """Skipped objects that a reader failed on."""
    read: list[ObjectInfo] = field(default_factory=list)
    """Objects that were read and judged."""
    names: dict[str, list[str]] = field(default_factory=dict)
    """What landed as which joined object or image, by its sha256."""

    @property
    def hostile(self) -> list[Rejection]:
        return [rejection for rejection in self.rejected if rejection.hostile]

    @property
    def rejected_rows(self) -> int:
        return sum(len(rejection.rows) or 1 for rejection in self.rejected)

    def count(self, copies: list[Landed], num_duplicates: int, num_rejected: int) -> bool:
        """Count the rows of an object that landed under several names, and note these; False where none is used."""
        first, *others = copies
        num_used = len(first.index) - num_duplicates - num_rejected
        if num_used:
            self.accepted[first.key] = num_used
            self.names.setdefault(first.sha256, []).extend(each.key for each in copies)
        if num_duplicates:
            self.duplicates[first.key] = num_duplicates
        self.duplicates.update({each.key: num_used + num_duplicates for each in others})
        return num_used > 0


class PackState(BaseModel):
    """The object that a set of images was packed into, so that they need not be read again."""

    version: Literal[1] = 1
    item: RawObject


class _Seen(BaseModel):
    etag: str
    size: int
    sha256: str


class _Memory(BaseModel):
    """Digests of landed objects by key, and pixel digests of single images by the digest of their bytes."""

    version: Literal[1] = 1
    preparation: str
    seen: dict[str, _Seen] = Field(default_factory=dict)
    pixels: dict[str, str] = Field(default_factory=dict)


def join_landed(raw: ObjectStore, known: Known, *, resize: bool) -> tuple[list[RawObject], LandingReport]:
    """The objects to join, in an order given by their content, after checking what landed against the images known.

    What is refused is moved, or its rows copied, to `rejected/` with a reason.
    """
    scan = scan_landing(raw)
    report = LandingReport(skipped=dict(scan.skipped))
    etags = {info.key: info.etag for info in scan.ready}

    def refuse(key: str, sha256: str, reason: str, rows: dict[int, str], hostile: bool = False) -> None:
        rejection = reject_object(raw, key, etags[key], sha256, reason, rows, hostile)
        if rejection:
            report.rejected.append(rejection)
        else:
            report.skipped[key] = "replaced while it was being judged: read again next time"

    found: defaultdict[tuple[bool, str, str], list[Landed]] = defaultdict(list)
    for number, (key, each) in enumerate(_examine(raw, scan.ready, resize), 1):
        progress.report("validating landed objects", number, len(scan.ready))
        if isinstance(each, Landed):
            found[each.identity].append(each)
            report.skipped.update({f"{key}, member {name}": why for name, why in each.index.unread.items()})
        elif each.refused:
            refuse(key, each.refused, each.reason, {}, each.hostile)
        else:
            report.skipped[key] = each.reason
            report.unread += each.reader_failed
    objects, images = [], []
    all_copies = [found[identity] for identity in sorted(found)]
    checked = check_landed([copies[0].index for copies in all_copies], known)
    for copies, (duplicates, rejected) in zip(all_copies, checked, strict=True):
        first, table = copies[0], copies[0].table
        if len(rejected) == len(first.index):
            reason = next(iter(rejected.values()))
            if table:
                reason = f"all {table.rows} rows are refused; the first one: {reason}"
            for each in copies:
                refuse(each.key, each.sha256, reason, rejected if table else {})
            continue
        if table and rejected:
            report.rejected.append(reject_rows(raw, first.key, table, rejected))
        if report.count(copies, len(duplicates), len(rejected)):
            if table:
                objects.append(table.model_copy(update={"excluded": ranges_of([*duplicates, *rejected])}))
            else:
                images.append(first)
    objects += _pack_images(raw, images, resize)
    report.read = [info for info in scan.ready if info.key not in report.skipped]
    return sorted(objects, key=lambda item: item.sha256), report


def _examine(raw: ObjectStore, infos: Sequence[ObjectInfo], resize: bool) -> Iterator[tuple[str, Landed | Unusable]]:
    """Judge each object on its own. Good tables are stored under their digests on the way."""
    empty = _Memory(preparation=f"{PREPARATION}{'r' if resize else 's'}")
    before = read_state(raw, _MEMORY_KEY, _Memory)
    if before is None or before.preparation != empty.preparation:
        before = empty
    memory = empty.model_copy(deep=True)
    for info in infos:
        found = _recall(raw, info, before, resize) or _read(raw, info, resize)
        if isinstance(found, Landed):
            memory.seen[info.key] = _Seen(etag=info.etag, size=info.size, sha256=found.sha256)
            if found.table is None:
                memory.pixels[found.sha256] = found.index.digests[0].tobytes().hex()
        yield info.key, found
    if memory != before:
        raw.write(_MEMORY_KEY, memory.model_dump_json().encode())


def _recall(raw: ObjectStore, info: ObjectInfo, memory: _Memory, resize: bool) -> Landed | None:
    seen = memory.seen.get(info.key)
    if seen is None or (seen.etag, seen.size) != (info.etag, info.size):
        return None
    if _is_image(info.key):
        pixels = memory.pixels.get(seen.sha256)
        return _image(info.key, seen.sha256, pixels) if pixels else None
    kind, split = _table_kind(info.key)
    index = load_index(raw, seen.sha256, split, resize)
    stored = (f"{OBJECTS_PREFIX}{seen.sha256}{suffix}" for suffix in _suffixes(kind))
    key = next((key for key in stored if is_present(raw, key, info.size)), None)
    return _table(info, seen.sha256, key, index) if key and index is not None else None


def _read(raw: ObjectStore, info: ObjectInfo, resize: bool) -> Landed | Unusable:
    try:
        found = _judge_image(raw, info, resize) if _is_image(info.key) else _judge_table(raw, info, resize)
    except ObjectNotFoundError:
        return Unusable("removed while it was being read")
    now = raw.stat(info.key)
    if now is None or (now.etag, now.size) != (info.etag, info.size):
        return Unusable("changed while it was being read: read again next time")
    return found


def _judge_image(raw: ObjectStore, info: ObjectInfo, resize: bool) -> Landed | Unusable:
    with raw.open(info.key) as file:
        sha256 = sha256_stream(file)
        file.seek(0)
        try:
            check_size(info.size)
            pixels, _ = ask("digest_picture", {"resize": resize}, info.key, payload=file.read(), num_bytes=info.size)
        except (DataError, ReaderFailedError) as error:
            return _unusable(error, sha256)
    return _image(info.key, sha256, pixels)


def _judge_table(raw: ObjectStore, info: ObjectInfo, resize: bool) -> Landed | Unusable:
    kind, split = _table_kind(info.key)
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if info.size > free:
        reason = f"has {info.size:,} bytes, but {tempfile.gettempdir()} has room for {free:,}: set TMPDIR, or remove it"
        return Unusable(reason, reader_failed=True)
    with tempfile.TemporaryDirectory(prefix="cifar-landed-") as folder:
        path = Path(folder, "object")
        raw.download(info.key, path)
        sha256 = sha256_file(path)
        index = load_index(raw, sha256, split, resize)
        if index is None:
            try:
                index = read_index(path, kind, split, info.key, resize=resize)
            except (DataError, ReaderFailedError) as error:
                return _unusable(error, sha256)
        if not len(index):
            return Unusable(f"{info.key} holds no rows.", refused=sha256)
        with path.open("rb") as file:  # the suffix is by content: the name something landed under must not matter
            suffix = _suffixes(kind)[0 if file.read(2) == b"\x1f\x8b" else -1]
        if len(index.refused) < len(index):
            key = store_object(raw, path, sha256, suffix)
        else:
            key = f"{OBJECTS_PREFIX}{sha256}{suffix}"
        save_index(raw, sha256, split, resize, index)
    return _table(info, sha256, key, index)


def _unusable(error: DataError | ReaderFailedError, sha256: str) -> Unusable:
    """Bad data is refused. A reader that failed in an unexpected way is not a reason to stop every build."""
    if isinstance(error, ReaderFailedError):
        return Unusable(str(error), reader_failed=True)
    return Unusable(str(error), sha256, hostile=isinstance(error, HostileDataError))


def _is_image(key: str) -> bool:
    return suffix_of(key) in PICTURE_SUFFIXES


def _image(key: str, sha256: str, pixels: str) -> Landed:
    name = key.removeprefix(LANDING_PREFIX)
    digests = np.frombuffer(bytes.fromhex(pixels), np.uint8).reshape(1, 32)
    split = SPLITS.index("test" if is_test(name) else "train")
    return Landed(key, sha256, ObjectIndex(digests, np.array([class_of(name)]), np.array([split], np.uint8), {}))


def _table_kind(key: str) -> tuple[ObjectFormat, Literal["mixed", "test", "train"]]:
    if suffix_of(key) in ARCHIVE_SUFFIXES:
        return "archive", "mixed"
    return "parquet", "test" if is_test(key.removeprefix(LANDING_PREFIX)) else "train"


def _suffixes(kind: ObjectFormat) -> tuple[str, ...]:
    return (".tar.gz", ".tar") if kind == "archive" else (f".{kind}",)


def _table(info: ObjectInfo, sha256: str, key: str, index: ObjectIndex) -> Landed:
    kind, split = _table_kind(info.key)
    size, rows = info.size, len(index)
    item = RawObject(key=key, sha256=sha256, size=size, format=kind, role="landed", split=split, rows=rows)
    return Landed(info.key, sha256, index, item)


def _pack_images(raw: ObjectStore, images: Sequence[Landed], resize: bool) -> list[RawObject]:
    """Objects that hold the images; the same ones for the same images, however they landed."""
    groups = grouped(images, lambda image: image.sha256, lambda image: 1)
    return [_pack(raw, sorted(group, key=lambda image: image.member), resize) for group in groups]


def _pack(raw: ObjectStore, images: Sequence[Landed], resize: bool) -> RawObject:
    state_key = f"{PACKS_PREFIX}{sha256_json([image.member for image in images])}.json"
    state = read_state(raw, state_key, PackState)
    if state and is_stored(raw, state.item.key, state.item.sha256, state.item.size):
        return state.item
    with tempfile.TemporaryDirectory(prefix="cifar-pack-") as folder:
        path = Path(folder, "images.tar")
        pack_images(path, ((image.member, _bytes_of(raw, image)) for image in images))
        sha256, size = sha256_file(path), path.stat().st_size
        key = store_object(raw, path, sha256, ".tar")
    rows = len(images)
    item = RawObject(key=key, sha256=sha256, size=size, format="images", role="landed", split="train", rows=rows)
    digests, labels, splits = (
        np.concatenate([getattr(image.index, name) for image in images]) for name in ("digests", "labels", "splits")
    )
    save_index(raw, sha256, "train", resize, ObjectIndex(digests, labels, splits, {}))
    raw.write(state_key, PackState(item=item).model_dump_json().encode())
    return item


def _bytes_of(raw: ObjectStore, image: Landed) -> bytes:
    try:
        return raw.read_verified(image.key, image.sha256)
    except IntegrityError as error:  # the next build judges it again
        raise ObjectChangedError(
            f"{raw.uri(image.key)} was replaced while it was being packed: build the raw dataset again.", transient=True
        ) from error
