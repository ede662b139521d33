"""Recognizing what a source folder (local or a bucket prefix) holds, and turning it into files of known format."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cifar_assets.contracts import CLASSES
from cifar_assets.dataset.formats.archive import BATCHES, MAX_MEMBER_BYTES
from cifar_assets.dataset.formats.image_tar import class_of, pack_images
from cifar_assets.dataset.formats.images import DEFAULT_LIMITS, PICTURE_SUFFIXES
from cifar_assets.dataset.formats.rows import Split
from cifar_assets.dataset.objects import ObjectFormat
from cifar_assets.dataset.progress import report
from resources.errors import DataError

ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".tar")
PACK_IMAGES = 20_000
"""Images per packed object, so that one object stays easy to move."""

_TEST_FILE = re.compile(r"test([-_.]?\d+([-_.]of[-_.]\d+)?([-_.][0-9a-f]{16})?)?")
_TEST_WORDS = ("test", "tests", "testing")


@dataclass(frozen=True)
class Entry:
    """One file of a source: name relative to the source, size, and how to get it as a local file."""

    name: str
    size: int
    fetch: Callable[[], Path]

    def read(self, max_bytes: int) -> bytes:
        """The content; DataError, before anything is fetched, where it is longer."""
        if self.size > max_bytes:
            raise DataError(
                f"{self.name} has {self.size:,} bytes; at most {max_bytes:,} are read. Remove or correct it."
            )
        return self.fetch().read_bytes()


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


def in_test_folder(name: str) -> bool:
    """Whether one of the folders in a path is named test."""
    return "test" in name.lower().split("/")[:-1]


def is_test_file(name: str) -> bool:
    """Whether a Parquet file is named test data: `test.parquet`, `test-00000-of-00001.parquet`, or below `test/`."""
    base = name.lower().rpartition("/")[2]
    return in_test_folder(name) or bool(_TEST_FILE.fullmatch(base.removesuffix(suffix_of(base))))


def recognize(entries: list[Entry], name: str, work: Path, unread: dict[str, str]) -> Iterator[SourceFile]:
    """The files that make up a source, one at a time. DataError when the layout is none of those known.

    `unread` gets every entry that is not part of the layout, and why.
    """
    hidden = [entry for entry in entries if any(part.startswith(".") for part in entry.name.split("/"))]
    unread.update({entry.name: "hidden" for entry in hidden})
    entries = sorted((entry for entry in entries if entry.name not in unread), key=lambda entry: entry.name)
    parquet = [entry for entry in entries if suffix_of(entry.name) == ".parquet"]
    archives = [entry for entry in entries if suffix_of(entry.name) in ARCHIVE_SUFFIXES]
    batches = [entry for entry in entries if _base(entry).startswith(("data_batch_", "test_batch", "batches.meta"))]
    images = [
        entry for entry in entries if suffix_of(entry.name) in PICTURE_SUFFIXES and class_of(entry.name) is not None
    ]
    if parquet:
        used, files = parquet, _parquet_shards(parquet, name)
    elif len(archives) == 1:
        used = archives
        files = iter(
            [SourceFile(archives[0].fetch(), archives[0].name, "archive", "mixed", suffix_of(archives[0].name))]
        )
    elif archives:
        found = ", ".join(entry.name for entry in archives)
        raise DataError(f"{name} holds several archives ({found}): name the one to use.")
    elif any(_base(entry).removesuffix(".bin") in BATCHES for entry in batches):
        used, files = batches, iter([_pack_batches(batches, name, work)])
    elif images:
        used, files = images, _pack_class_folders(images, name, work)
    else:
        shown = ", ".join(entry.name for entry in entries[:5]) or "nothing"
        raise DataError(
            f"{name} is not a dataset known here: found {shown}. Expected the official archive (.tar.gz) or its "
            f"batches, Parquet files in the Hugging Face layout, or folders named {', '.join(CLASSES[:3])}, ... with "
            "images, with or without train/ and test/ above them."
        )
    kind = "images in class folders" if used is images else f"the {'Parquet files' if used is parquet else 'archive'}"
    names = {entry.name for entry in used}
    unread.update({entry.name: f"only {kind} are read" for entry in entries if entry.name not in names})
    yield from files


def _parquet_shards(entries: list[Entry], name: str) -> Iterator[SourceFile]:
    has_test = any(is_test_file(entry.name) for entry in entries)
    for entry in entries:
        if not is_test_file(entry.name):
            _check_clear(entry.name, suffix_of(entry.name), name)
        split = "test" if is_test_file(entry.name) else "train" if has_test else "any"
        yield SourceFile(entry.fetch(), entry.name, "parquet", split, ".parquet")


def _check_clear(path: str, suffix: str, name: str) -> None:
    """Refuse a name that may be meant to say test split, but does not say it as documented: nothing is guessed."""
    for part in path.lower().removesuffix(suffix).split("/"):
        words = [word for word in re.findall("[a-z]+", part) if word != "of"]
        if words and (words[0] in _TEST_WORDS or words[-1] in _TEST_WORDS):
            raise DataError(
                f"{name}: it is not clear whether {path} belongs to a test split. Put test data into a folder named "
                "test, or name a Parquet file test.parquet or test-00000.parquet; rename what is not test data."
            )


def _base(entry: Entry) -> str:
    return entry.name.rpartition("/")[2]


def _pack_batches(entries: list[Entry], name: str, work: Path) -> SourceFile:
    target = work / "batches.tar"
    pack_images(target, ((entry.name, entry.read(MAX_MEMBER_BYTES)) for entry in entries))
    return SourceFile(target, name, "archive", "mixed", ".tar")


def _pack_class_folders(entries: list[Entry], name: str, work: Path) -> Iterator[SourceFile]:
    has_test = any(in_test_folder(entry.name) for entry in entries)
    groups: dict[Split, list[Entry]] = {"train": [], "test": [], "any": []}
    for entry in entries:
        if not in_test_folder(entry.name):
            _check_clear(entry.name.rpartition("/")[0], "", name)
        groups["test" if in_test_folder(entry.name) else "train" if has_test else "any"].append(entry)
    done = 0
    for split, group in groups.items():
        for start in range(0, len(group), PACK_IMAGES):
            part = group[start : start + PACK_IMAGES]
            target = work / f"{split}-{start}.tar"
            pack_images(target, ((entry.name, entry.read(DEFAULT_LIMITS.max_bytes)) for entry in part))
            done += len(part)
            report(f"packing {name}", done, len(entries))
            yield SourceFile(
                target, f"{name} ({split} images {start} to {start + len(part) - 1})", "images", split, ".tar"
            )
            target.unlink()
