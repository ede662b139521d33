"""Joins landed data: each object is read, checked against the images in use, and joined or rejected.

An object that did not change since the last build is not read again: the record of that build has its digest, and the
index stored under that digest has the rest. Single images are packed a few dozen to an object, so that an added image
rewrites only one small pack.
"""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cifar_assets.contracts import LANDING_PREFIX
from cifar_assets.dataset import progress
from cifar_assets.dataset.consistency import Known, check_landed
from cifar_assets.dataset.formats.encoded import pack_images
from cifar_assets.dataset.formats.images import SOURCE_LIMITS, check_size
from cifar_assets.dataset.formats.isolated import ReaderFailedError
from cifar_assets.dataset.formats.names import PICTURE_SUFFIXES, class_of, folder_name, split_of, suffix_of
from cifar_assets.dataset.formats.rows import SPLITS, Preparation
from cifar_assets.dataset.index import ObjectIndex, load_index, read_index, save_index
from cifar_assets.dataset.landing.rejection import Rejection, reject_object, reject_rows
from cifar_assets.dataset.landing.zone import LandingRecord, Seen, fingerprint, scan_landing
from cifar_assets.dataset.objects import RawObject, grouped, is_present, is_stored, ranges_of, store_object
from resources.digests import sha256_file, sha256_json
from resources.errors import DataError, IntegrityError, ObjectChangedError, ObjectNotFoundError
from resources.object_store import ObjectInfo, ObjectStore

_SHOWN_CLASSES = 10


@dataclass(frozen=True)
class Landed:
    """An object that was read: a Parquet file, an archive, or one image, which is packed with others."""

    info: ObjectInfo
    seen: Seen
    index: ObjectIndex
    folder: str = ""
    """The folder of an image's class."""

    @property
    def about(self) -> str:
        """Derived from the name: copies under other names may differ."""
        table, index = self.seen.table, self.index
        return table.split if table else f"{self.folder}:{SPLITS[index.splits[0]]}"

    @property
    def order(self) -> tuple[bool, str, str, str]:
        """Ordered by content first: which of several copies is used must not depend on names or times."""
        return self.seen.table is None, self.seen.sha256, self.about, self.info.key

    @property
    def member(self) -> str:
        """The name of an image in its pack, independent of the name it landed under."""
        return f"{self.folder}/{self.seen.sha256}"


class _RefusedError(Exception):
    """Key of the object with this sha256."""

    def __init__(self, sha256: str, reason: str) -> None:
        super().__init__(reason)
        self.sha256 = sha256


@contextmanager
def _refusing(sha256: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise _RefusedError(sha256, str(error)) from error


@dataclass
class LandingReport:
    """The outcome for the landing zone's objects, by key in the raw bucket."""

    accepted: dict[str, int] = field(default_factory=dict)
    """Rows that joined the version."""
    duplicates: dict[str, int] = field(default_factory=dict)
    """Rows not used because the version already has the same pixels. Their objects are not moved."""
    rejected: list[Rejection] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    unread: int = 0
    """Skipped objects that a reader failed on."""
    names: dict[str, list[str]] = field(default_factory=dict)
    """The landed names of each joined object or image, by its sha256."""
    record: LandingRecord = field(default_factory=LandingRecord)
    """The record of this build, stored after its version is published."""

    @property
    def rejected_rows(self) -> int:
        return sum(len(rejection.rows) or 1 for rejection in self.rejected)

    def refuse(self, raw: ObjectStore, info: ObjectInfo, sha256: str, reason: str, rows: dict[int, str]) -> None:
        """Move an object away, unless it was replaced since it was read."""
        if rejection := reject_object(raw, info.key, info.etag, sha256, reason, rows):
            self.rejected.append(rejection)
        else:
            self.skipped[info.key] = "replaced while it was being checked; it will be read again next time"


def join_landed(raw: ObjectStore, known: Known, how: Preparation) -> tuple[list[RawObject], LandingReport]:
    """The objects to join, ordered by content, after checking landed data against the known images.

    Refused data is moved to `rejected/` with a reason; an object with only some refused rows stays.
    """
    scan = scan_landing(raw)
    before = LandingRecord.load(raw)
    if before is None or before.preparation != how.key:
        before = LandingRecord()
    foreign = {info.key: reason for info in scan.ready if (reason := _why_foreign(info.key, how.classes))}
    report = LandingReport(skipped={**scan.skipped, **foreign})
    landed = _read_ready(raw, [info for info in scan.ready if info.key not in foreign], before, how, report)
    checked = check_landed([each.index for each in landed], known, how.classes)
    objects: list[RawObject] = []
    images: list[Landed] = []
    seen: dict[str, Seen] = {}
    for each, (duplicates, rejected) in zip(landed, checked, strict=True):
        if len(rejected) == len(each.index):
            _refuse_all(raw, each, rejected, report)
            continue
        key, table = each.info.key, each.seen.table
        if rejected:
            report.rejected.append(reject_rows(raw, key, each.seen.sha256, len(each.index), rejected))
        if duplicates:
            report.duplicates[key] = len(duplicates)
        if num_used := len(each.index) - len(duplicates) - len(rejected):
            report.accepted[key] = num_used
            if table:
                objects.append(table.model_copy(update={"excluded": ranges_of([*duplicates, *rejected])}))
            else:
                images.append(each)
        report.names.setdefault(each.seen.sha256, []).append(key)
        seen[fingerprint(each.info)] = each.seen
    packs = {name: _pack(raw, group, before.packs.get(name), how) for name, group in _groups(images).items()}
    read = (info for info in scan.ready if info.key in foreign or info.key not in report.skipped)
    report.record = LandingRecord(read=frozenset(map(fingerprint, read)), preparation=how.key, seen=seen, packs=packs)
    return sorted([*objects, *packs.values()], key=lambda item: item.sha256), report


def _read_ready(
    raw: ObjectStore, ready: Sequence[ObjectInfo], before: LandingRecord, how: Preparation, report: LandingReport
) -> list[Landed]:
    """The objects that can be used, in the order in which they count. What happened to the others is reported."""
    landed: list[Landed] = []
    for number, info in enumerate(ready, 1):
        progress.report("validating landed objects", number, len(ready))
        try:
            found = _recall(raw, info, before, how) or _read(raw, info, how)
            landed.append(found)
            report.skipped.update({f"{info.key}, member {name}": why for name, why in found.index.unread.items()})
        except _RefusedError as error:
            report.refuse(raw, info, error.sha256, str(error), {})
        except ReaderFailedError as error:  # nothing is known about the object: it does not stop the build
            report.skipped[info.key] = str(error)
            report.unread += 1
        except (ObjectChangedError, ObjectNotFoundError) as error:
            report.skipped[info.key] = f"it will be read again next time: {error}"
    return sorted(landed, key=lambda each: each.order)


def _refuse_all(raw: ObjectStore, each: Landed, rejected: dict[int, str], report: LandingReport) -> None:
    reason = next(iter(rejected.values()))
    if each.seen.table:
        reason = f"all {len(rejected)} rows are refused; reason for the first: {reason}"
    report.refuse(raw, each.info, each.seen.sha256, reason, rejected if each.seen.table else {})


def _why_foreign(key: str, classes: tuple[str, ...]) -> str | None:
    """Why a picture belongs to no class of the dataset: it is left alone, as its classes may be those of the next."""
    if suffix_of(key) not in PICTURE_SUFFIXES or class_of(key.removeprefix(LANDING_PREFIX), classes) is not None:
        return None
    shown = ", ".join(classes[:_SHOWN_CLASSES]) + (", ..." if len(classes) > _SHOWN_CLASSES else "")
    return (
        f"an image of a class that the dataset does not have: put it under {LANDING_PREFIX}<class>/, class one of "
        f"{shown}, or add the class to the source"
    )


def _recall(raw: ObjectStore, info: ObjectInfo, before: LandingRecord, how: Preparation) -> Landed | None:
    seen = before.seen.get(fingerprint(info))
    if seen is None:
        return None
    if seen.table is None:
        return _image(info, seen, how)
    index = load_index(raw, seen.sha256, seen.table.split, how)
    return Landed(info, seen, index) if index and is_present(raw, seen.table.key, seen.table.size) else None


def _read(raw: ObjectStore, info: ObjectInfo, how: Preparation) -> Landed:
    room = shutil.disk_usage(tempfile.gettempdir()).free
    if info.size > room:
        raise ReaderFailedError(
            f"has {info.size:,} bytes, but {tempfile.gettempdir()} has room for {room:,}: set TMPDIR, or remove it"
        )
    with tempfile.TemporaryDirectory(prefix="cifar-landed-") as folder:
        path = Path(folder, "object")
        raw.download(info.key, path)
        now = raw.stat(info.key)
        if now is None or (now.etag, now.size) != (info.etag, info.size):
            raise ObjectChangedError("it changed while it was being read", transient=True)
        sha256 = sha256_file(path)
        if suffix_of(info.key) not in PICTURE_SUFFIXES:
            return _read_table(raw, info, path, sha256, how)
        with _refusing(sha256):
            check_size(info.size, SOURCE_LIMITS)
            index = read_index(path, "picture", "train", info.key, how)
            if index.refused:
                raise DataError(index.refused[0])
        return _image(info, Seen(sha256=sha256, pixels=index.digests.tobytes().hex()), how)


def _read_table(raw: ObjectStore, info: ObjectInfo, path: Path, sha256: str, how: Preparation) -> Landed:
    """Stored under its digest, unless no row can be used. The suffix follows the content: the name must not matter."""
    kind = "parquet" if suffix_of(info.key) == ".parquet" else "archive"
    split = "mixed"
    if kind == "parquet":
        split = "test" if split_of(info.key.removeprefix(LANDING_PREFIX)) == "test" else "train"
    with _refusing(sha256):
        index = load_index(raw, sha256, split, how) or read_index(path, kind, split, info.key, how)
        if not len(index):
            raise DataError(f"{info.key} holds no rows.")
    with path.open("rb") as file:
        suffix = ".parquet" if kind == "parquet" else ".tar.gz" if file.read(2) == b"\x1f\x8b" else ".tar"
    key = store_object(raw, path, sha256, suffix) if len(index.refused) < len(index) else ""
    save_index(raw, sha256, split, how, index)
    rows = len(index)
    table = RawObject(key=key, sha256=sha256, size=info.size, format=kind, role="landed", split=split, rows=rows)
    return Landed(info, Seen(sha256=sha256, table=table), index)


def _image(info: ObjectInfo, seen: Seen, how: Preparation) -> Landed:
    name = info.key.removeprefix(LANDING_PREFIX)
    digests = np.frombuffer(bytes.fromhex(seen.pixels), np.uint8).reshape(1, 32)
    split = SPLITS.index("test" if split_of(name) == "test" else "train")
    label = class_of(name, how.classes)
    assert label is not None  # otherwise it was refused
    index = ObjectIndex(digests, np.array([label]), np.array([split], np.uint8), {})
    return Landed(info, seen, index, folder_name(how.classes[label]))


def _groups(images: Sequence[Landed]) -> dict[str, list[Landed]]:
    """The images of each pack, by the digest of their names. Independent of how the images landed."""
    groups = grouped(images, lambda image: image.seen.sha256, lambda image: 1)
    ordered = [sorted(group, key=lambda image: image.member) for group in groups]
    return {sha256_json([image.member for image in group]): group for group in ordered}


def _pack(raw: ObjectStore, images: Sequence[Landed], before: RawObject | None, how: Preparation) -> RawObject:
    if before and is_stored(raw, before.key, before.sha256, before.size):
        return before
    with tempfile.TemporaryDirectory(prefix="cifar-pack-") as folder:
        path = Path(folder, "images.tar")
        try:
            members = ((image.member, raw.read_verified(image.info.key, image.seen.sha256)) for image in images)
            pack_images(path, members)
        except IntegrityError as error:
            raise ObjectChangedError(
                f"{error} A landed image was replaced while it was being packed: build the raw dataset again.",
                transient=True,
            ) from error
        sha256, size = sha256_file(path), path.stat().st_size
        key = store_object(raw, path, sha256, ".tar")
    digests, labels, splits = (
        np.concatenate([getattr(image.index, name) for image in images]) for name in ("digests", "labels", "splits")
    )
    save_index(raw, sha256, "train", how, ObjectIndex(digests, labels, splits, {}))
    return RawObject(key=key, sha256=sha256, size=size, format="images", role="landed", split="train", rows=len(images))
