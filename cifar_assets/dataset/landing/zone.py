"""The landing zone: whatever people put under `landing/` is validated, joined into the next version, or rejected."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from cifar_assets.contracts import CLASSES, LANDING_PREFIX
from cifar_assets.dataset import progress
from cifar_assets.dataset.consistency import Known, check_landed
from cifar_assets.dataset.formats.names import ARCHIVE_SUFFIXES, PICTURE_SUFFIXES, class_of, suffix_of
from cifar_assets.dataset.index import ObjectIndex
from cifar_assets.dataset.landing.completeness import Budget, unlisted, why_not_ready
from cifar_assets.dataset.landing.landed import LandedImage, LandedTable, NotJudged, Refused, examine
from cifar_assets.dataset.landing.packs import pack_landed_images
from cifar_assets.dataset.landing.rejection import Rejection, reject_object, reject_rows
from cifar_assets.dataset.objects import RawObject
from resources.object_store import ObjectInfo, ObjectStore

UNFINISHED_SUFFIXES = (".part", ".partial", ".tmp", ".temp", ".crdownload", ".filepart", ".download", ".swp", "~")
TABLE_SUFFIXES = (*ARCHIVE_SUFFIXES, ".parquet")


@dataclass(frozen=True)
class LandingScan:
    """What lies in the landing zone, by name and size alone."""

    ready: tuple[ObjectInfo, ...]
    skipped: dict[str, str]
    """Why an object is not looked at, by key."""


@dataclass(frozen=True)
class LandingReport:
    """What became of the landing zone's objects, by key in the raw bucket."""

    accepted: dict[str, int] = field(default_factory=dict)
    """Rows that joined the version."""
    duplicates: dict[str, int] = field(default_factory=dict)
    """Rows not used because the same pixels are in the version already. They stay where they are."""
    rejected: tuple[Rejection, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    unread: int = 0
    """Skipped objects that a reader failed on."""
    read: tuple[ObjectInfo, ...] = ()
    """Objects that were read and judged."""

    @property
    def hostile(self) -> tuple[Rejection, ...]:
        return tuple(rejection for rejection in self.rejected if rejection.hostile)

    @property
    def rejected_rows(self) -> int:
        return sum(len(rejection.rows) or 1 for rejection in self.rejected)


def classify_landing_object(key: str, size: int) -> str | None:
    """Why an object under `landing/` is not data to be read, or None when it is to be validated. Reads nothing."""
    name = key.removeprefix(LANDING_PREFIX)
    base = name.rpartition("/")[2]
    if not base:
        return "a folder marker" if size == 0 else f"has no name: expected {_EXPECTED}"
    if not key.isascii() and key != key.encode(errors="replace").decode():
        return "its name is not UTF-8"
    if base.startswith(".") or any(part.startswith(".") for part in name.split("/")):
        return "a hidden or placeholder file"
    if base.lower().endswith(UNFINISHED_SUFFIXES):
        return "an unfinished upload"
    if size == 0:
        return "empty (0 bytes)"
    suffix = suffix_of(base)
    if suffix in TABLE_SUFFIXES:
        return None
    if suffix in PICTURE_SUFFIXES:
        if class_of(name) is not None:
            return None
        return (
            f"an image outside a class folder: put it under {LANDING_PREFIX}<class>/, class one of {', '.join(CLASSES)}"
        )
    return f"not a kind of data that is read here: expected {_EXPECTED}"


_EXPECTED = "a .parquet file, an official archive (.tar.gz), or images in class folders"


def scan_landing(raw: ObjectStore) -> LandingScan:
    """List the landing zone and sort out what is not data yet. Cheap: one listing, and a look at files just written."""
    ready: list[ObjectInfo] = []
    skipped, budget = unlisted(raw), Budget()
    for info in raw.list(LANDING_PREFIX):
        reason = classify_landing_object(info.key, info.size) or why_not_ready(raw, info, budget)
        if reason is None:
            ready.append(info)
        else:
            skipped[info.key.encode(errors="backslashreplace").decode()] = reason
    return LandingScan(tuple(ready), skipped)


def join_landed(
    raw: ObjectStore, known: Known, *, resize: bool
) -> tuple[list[RawObject], LandingReport, dict[str, list[str]]]:
    """Validate what landed against the images known.

    Gives the objects to join, in an order given by their content; the report; and the landed names of each sha256.
    What is refused is moved, or its rows copied, to `rejected/` with a reason.
    """
    scan = scan_landing(raw)
    skipped = dict(scan.skipped)
    tables: dict[tuple[str, str], LandedTable] = {}
    images: dict[str, LandedImage] = {}
    names: defaultdict[str, list[str]] = defaultdict(list)
    rejected: list[Rejection] = []
    etags = {info.key: info.etag for info in scan.ready}

    def refuse(key: str, sha256: str, reason: str, **more: Any) -> None:
        rejection = reject_object(raw, key, etags[key], sha256, reason, **more)
        if rejection is None:
            skipped[key] = "replaced while it was being judged: looked at again next time"
        else:
            rejected.append(rejection)

    unread = 0
    for number, (info, found) in enumerate(examine(raw, scan.ready, resize), 1):
        progress.report("validating landed objects", number, len(scan.ready))
        if isinstance(found, NotJudged):
            skipped[info.key] = found.reason
            unread += found.reader_failed
        elif isinstance(found, Refused):
            refuse(info.key, found.sha256, found.reason, hostile=found.hostile)
        elif isinstance(found, LandedTable):
            tables[found.item.sha256, found.item.split] = found
            skipped.update({f"{info.key}, member {name}": why for name, why in found.index.unread.items()})
            names[f"{found.item.sha256}:{found.item.split}"].append(info.key)
        else:
            images[found.identity] = found
            names[found.identity].append(info.key)
    table_list = [tables[identity] for identity in sorted(tables)]
    image_list = [images[identity] for identity in sorted(images)]
    indexes: list[ObjectIndex] = [*(table.index for table in table_list), *(image.index() for image in image_list)]
    verdicts = check_landed(indexes, known)
    report = LandingReport({}, {}, (), skipped)
    objects = []
    for table, verdict in zip(table_list, verdicts, strict=False):
        keys = names.pop(f"{table.item.sha256}:{table.item.split}")
        item = table.item.model_copy(update={"excluded": verdict.excluded()})
        if verdict.rejected and len(verdict.rejected) == item.rows:
            first = next(iter(verdict.rejected.values()))
            for key in keys:
                reason = f"all {item.rows} rows are refused; the first one: {first}"
                refuse(key, item.sha256, reason, rows=verdict.rejected)
            continue
        _count(report, keys, item.used_rows, len(verdict.duplicates))
        if verdict.rejected:
            rejected.append(reject_rows(raw, keys[0], item, verdict.rejected))
        if item.used_rows:
            objects.append(item)
            names[item.sha256] += keys
    good = []
    for image, verdict in zip(image_list, verdicts[len(table_list) :], strict=True):
        keys = names.pop(image.identity)
        if verdict.rejected:
            for key in keys:
                refuse(key, image.sha256, verdict.rejected[0])
            continue
        _count(report, keys, 0 if verdict.duplicates else 1, len(verdict.duplicates))
        if not verdict.duplicates:
            good.append(image)
            names[image.sha256] += keys
    if good:
        objects += pack_landed_images(raw, good, resize)
    used = {item.sha256 for item in objects} | {image.sha256 for image in good}
    read = tuple(info for info in scan.ready if info.key not in skipped)
    final = LandingReport(report.accepted, report.duplicates, tuple(rejected), skipped, unread, read)
    return (
        sorted(objects, key=lambda item: item.sha256),
        final,
        {key: sorted(names[key]) for key in sorted(used & names.keys())},
    )


def _count(report: LandingReport, keys: list[str], used: int, duplicates: int) -> None:
    first, *copies = keys
    if used:
        report.accepted[first] = used
    if duplicates:
        report.duplicates[first] = duplicates
    for copy in copies:
        report.duplicates[copy] = used + duplicates
