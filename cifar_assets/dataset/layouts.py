"""Recognizing what a source folder (local or a bucket prefix) holds, and turning it into files of known format."""

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cifar_assets.contracts import CLASSES
from cifar_assets.dataset.formats.archive import BATCHES
from cifar_assets.dataset.formats.image_tar import class_of, pack_images
from cifar_assets.dataset.images import PICTURE_SUFFIXES
from cifar_assets.dataset.objects import ObjectFormat
from cifar_assets.dataset.progress import Progress
from cifar_assets.dataset.rows import Split
from cifar_assets.errors import DataError

logger = logging.getLogger(__name__)

ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar")
PACK_IMAGES = 20_000
"""Images per packed object, so that one object stays easy to move."""

_TEST_NAME = re.compile(r"(^|[^a-z])test([^a-z]|$)")


@dataclass(frozen=True)
class Entry:
    """One file of a source: name relative to the source, size, and how to get it as a local file."""

    name: str
    size: int
    fetch: Callable[[], Path]


@dataclass(frozen=True)
class SourceFile:
    """A local file of known format, ready to be validated and stored."""

    path: Path
    name: str
    format: ObjectFormat
    split: Split | str
    suffix: str


def suffix_of(name: str) -> str:
    """The file name's suffix in lower case, `.tar.gz` as one."""
    lower = name.lower()
    return next((suffix for suffix in ARCHIVE_SUFFIXES if lower.endswith(suffix)), PurePosixPath(lower).suffix)


def recognize(entries: list[Entry], name: str, work: Path, progress: Progress) -> Iterator[SourceFile]:
    """The files that make up a source, one at a time. DataError when the layout is none of those known."""
    entries = sorted(
        (entry for entry in entries if not any(part.startswith(".") for part in entry.name.split("/"))),
        key=lambda entry: entry.name,
    )
    parquet = [entry for entry in entries if suffix_of(entry.name) == ".parquet"]
    archives = [entry for entry in entries if suffix_of(entry.name) in ARCHIVE_SUFFIXES]
    batches = [entry for entry in entries if _base(entry).removesuffix(".bin") in BATCHES]
    images = [
        entry for entry in entries if suffix_of(entry.name) in PICTURE_SUFFIXES and class_of(entry.name) is not None
    ]
    if parquet:
        yield from _parquet_shards(parquet)
    elif len(archives) == 1:
        yield SourceFile(archives[0].fetch(), archives[0].name, "archive", "mixed", suffix_of(archives[0].name))
    elif archives:
        found = ", ".join(entry.name for entry in archives)
        raise DataError(f"{name} holds several archives ({found}): name the one to use.")
    elif batches:
        yield _pack_batches(entries, name, work)
    elif images:
        skipped = len(entries) - len(images)
        if skipped:
            logger.warning("%s: %d files are no images in a class folder and were left out.", name, skipped)
        yield from _pack_class_folders(images, name, work, progress)
    else:
        shown = ", ".join(entry.name for entry in entries[:5]) or "nothing"
        raise DataError(
            f"{name} is no dataset known here: found {shown}. Expected the official archive (.tar.gz) or its batches, "
            f"Parquet files in the Hugging Face layout, or folders named {', '.join(CLASSES[:3])}, ... with images, "
            "with or without train/ and test/ above them."
        )


def _parquet_shards(entries: list[Entry]) -> Iterator[SourceFile]:
    has_test = any(_is_test(entry) for entry in entries)
    for entry in entries:
        split = "test" if _is_test(entry) else "train" if has_test else "any"
        yield SourceFile(entry.fetch(), entry.name, "parquet", split, ".parquet")


def is_test_name(name: str) -> bool:
    """Whether a path says by a folder or by its file name that it belongs to the test split."""
    return bool(_TEST_NAME.search(name.lower()))


def _is_test(entry: Entry) -> bool:
    return is_test_name(entry.name)


def _base(entry: Entry) -> str:
    return entry.name.rpartition("/")[2]


def _pack_batches(entries: list[Entry], name: str, work: Path) -> SourceFile:
    wanted = {
        entry.name: entry for entry in entries if _base(entry).startswith(("data_batch_", "test_batch", "batches.meta"))
    }
    target = work / "batches.tar"
    pack_images(target, ((key, entry.fetch().read_bytes()) for key, entry in sorted(wanted.items())))
    return SourceFile(target, name, "archive", "mixed", ".tar")


def _pack_class_folders(entries: list[Entry], name: str, work: Path, progress: Progress) -> Iterator[SourceFile]:
    has_test = any("test" in entry.name.lower().split("/")[:-1] for entry in entries)
    groups: dict[Split, list[Entry]] = {"train": [], "test": [], "any": []}
    for entry in entries:
        in_test = "test" in entry.name.lower().split("/")[:-1]
        groups["test" if in_test else "train" if has_test else "any"].append(entry)
    done = 0
    for split, group in groups.items():
        for start in range(0, len(group), PACK_IMAGES):
            part = group[start : start + PACK_IMAGES]
            target = work / f"{split}-{start}.tar"
            pack_images(target, ((entry.name, entry.fetch().read_bytes()) for entry in part))
            done += len(part)
            progress(f"packing {name}", done, len(entries))
            yield SourceFile(
                target, f"{name} ({split} images {start} to {start + len(part) - 1})", "images", split, ".tar"
            )
            target.unlink()
