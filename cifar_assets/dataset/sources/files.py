"""Finds the files of a source at its address and recognizes their layout and format."""

import os
import re
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cifar_assets.contracts import CLASSES
from cifar_assets.dataset.formats.archive import pack_records
from cifar_assets.dataset.formats.encoded import pack_images
from cifar_assets.dataset.formats.images import DEFAULT_LIMITS
from cifar_assets.dataset.formats.names import ARCHIVE_SUFFIXES, PICTURE_SUFFIXES, class_of, is_test, suffix_of
from cifar_assets.dataset.formats.rows import SPLITS, Split
from cifar_assets.dataset.objects import LINKED_FOLDER, UNREADABLE_FOLDER, ObjectFormat, printable, unlisted
from cifar_assets.dataset.sources import synthetic
from cifar_assets.dataset.sources.download import CHOICES, check_file, fetch, split_digest
from resources.errors import ConfigError, DataError
from resources.object_store import FolderStore, ObjectStore, open_store
from resources.redaction import redacted

_PACK_IMAGES = 20_000
"""Images per packed object, so that one object stays easy to move."""
_TEST_WORD = re.compile("(?<![a-z])test(s|ing)?(?![a-z])")


@dataclass(frozen=True)
class SourceFile:
    """A local file of known format, ready to be validated and stored."""

    path: Path
    name: str
    format: ObjectFormat
    split: Split | Literal["mixed"]
    suffix: str


def source_files(address: str, work: Path, unread: dict[str, str]) -> Iterator[SourceFile]:
    """The files at an address, one at a time: a file in the folder `work` is deleted when the next one is requested.

    `unread` receives what is not part of the layout, with the reason. Raises ConfigError for an address that is invalid
    or does not exist, DataError for an unknown layout.
    """
    if address == "synthetic" or address.startswith("synthetic:"):
        yield from _synthetic_files(address, work)
        return
    base, digest = split_digest(address)
    if base.startswith(("http://", "https://")):
        fetch(base, work / "object", digest)
        yield _one_file(work / "object", urllib.parse.unquote(urllib.parse.urlsplit(base).path), redacted(base))
        return
    try:
        store, key = _locate(base)
        is_file = bool(key) and store.exists(key)
    except (ValueError, OSError) as error:
        raise ConfigError(f"Source {redacted(address)[:200]!r} cannot be accessed: {error}. {CHOICES}") from error
    if is_file:
        path = _local_copy(store, key, work)
        check_file(path, digest, base)
        yield _one_file(path, key, base)
    elif digest:
        raise ConfigError(f"Source {address!r} is not a single file: remove #md5= or #sha256=, or name the file.")
    else:
        yield from _folder_files(store, f"{key}/" if key else "", base, work, unread)


def _synthetic_files(address: str, work: Path) -> Iterator[SourceFile]:
    seed = address.partition(":")[2] or "0"
    if not seed.isdecimal():
        raise ConfigError(f"Source {address!r}: the seed must be a whole number, as in synthetic:7. {CHOICES}")
    splits: tuple[tuple[Split, int], ...] = (("train", synthetic.TRAIN_ROWS), ("test", synthetic.TEST_ROWS))
    for split, rows in splits:
        path = work / f"{split}.bin"
        path.write_bytes(pack_records(*synthetic.draw_split(int(seed), split, rows)))
        yield SourceFile(path, f"{address} ({split})", "records", split, ".bin")


def _locate(address: str) -> tuple[ObjectStore, str]:
    """The store for a path or an s3:// address, and the key in it, which is used unchanged."""
    if not address.startswith("s3://"):
        path = Path(os.path.abspath(os.path.expanduser(address)))
        return FolderStore(path.parent), path.name
    bucket, _, key = address.removeprefix("s3://").partition("/")
    return open_store(f"s3://{bucket}"), key.removesuffix("/")


def _local_copy(store: ObjectStore, key: str, work: Path) -> Path:
    """The object as a local file: in place if the store is a folder, else a copy that replaces the previous one."""
    path = store.local_path(key)
    if path is None:
        path = work / "object"
        store.download(key, path)
    return path


def _one_file(path: Path, name: str, address: str) -> SourceFile:
    suffix = suffix_of(name)
    if suffix in ARCHIVE_SUFFIXES:
        return SourceFile(path, address, "archive", "mixed", suffix)
    if suffix == ".parquet":
        return SourceFile(path, address, "parquet", "any", suffix)
    raise ConfigError(f"Source {address!r}: expected a .tar.gz, .tgz, .tar or .parquet file, or a folder. {CHOICES}")


def _folder_files(
    store: ObjectStore, prefix: str, source: str, work: Path, unread: dict[str, str]
) -> Iterator[SourceFile]:
    """The files of a folder or prefix: Parquet, or images in class folders."""
    unread.update({key.removeprefix(prefix): reason for key, reason in unlisted(store, prefix).items()})
    for name, reason in unread.items():
        if "/." in f"/{name}":
            continue
        if reason == LINKED_FOLDER:  # it may be the test split
            raise DataError(f"{source}: {name} is {reason}, or remove the link.")
        if _is_part(name if reason.startswith(UNREADABLE_FOLDER) else name.rpartition("/")[2]):
            raise DataError(
                f"{source}: {name} cannot be read ({reason}), and may hold a split or a class. Make it readable, or "
                "remove it."
            )
    sizes = {info.key.removeprefix(prefix): info.size for info in store.list(prefix) if not info.key.endswith("/")}
    if not sizes and not unread:
        raise ConfigError(f"Source {source!r}: there is no file, folder, object or prefix with this name. {CHOICES}")
    unread.update({name: "hidden" for name in sizes if "/." in f"/{name}"})
    visible = [name for name in sizes if printable(name) not in unread]
    parquet = [name for name in visible if suffix_of(name) == ".parquet"]
    images = [name for name in visible if suffix_of(name) in PICTURE_SUFFIXES and class_of(name) is not None]
    used = parquet or images
    if not used:
        found = [*visible, *(f"{name} ({reason})" for name, reason in unread.items())]
        raise DataError(
            f"{source} is not a recognized dataset: found {', '.join(found[:5])}. Expected Parquet files in the Hugging"
            f" Face layout, or folders named {', '.join(CLASSES[:3])}, ... with images, with or without train/ and "
            "test/ above them. For an official archive, name the file, not its folder."
        )
    kind = "Parquet files" if parquet else "images in class folders"
    unread.update({name: f"only {kind} are read" for name in visible if name not in set(used)})
    pairs = _with_splits(used, source)
    if parquet:
        for name, split in pairs:
            path = _local_copy(store, prefix + name, work)
            yield SourceFile(path, name, "parquet", split, ".parquet")
        return
    for name in images:
        if sizes[name] > DEFAULT_LIMITS.max_bytes:
            limit = f"at most {DEFAULT_LIMITS.max_bytes:,} are read. Remove or correct it."
            raise DataError(f"{name} has {sizes[name]:,} bytes; {limit}")
    yield from _packed_class_folders(pairs, lambda name: _local_copy(store, prefix + name, work), source, work)


def _is_part(name: str) -> bool:
    """Whether the name is that of a Parquet file, or of a folder of a split or class or in one."""
    folder = f"{name.lower()}/"
    is_folder = is_test(folder) or "train" in folder.split("/") or class_of(folder) is not None
    return is_folder or suffix_of(name) == ".parquet"


def _packed_class_folders(
    pairs: list[tuple[str, Split]], fetch: Callable[[str], Path], source: str, work: Path
) -> Iterator[SourceFile]:
    for split in SPLITS:
        group = [name for name, its_split in pairs if its_split == split]
        for start in range(0, len(group), _PACK_IMAGES):
            part, target = group[start : start + _PACK_IMAGES], work / f"{split}-{start}.tar"
            pack_images(target, ((name, fetch(name).read_bytes()) for name in part))
            shown = f"{source} ({split} images {start} to {start + len(part) - 1})"
            yield SourceFile(target, shown, "images", split, ".tar")
            target.unlink()


def _with_splits(names: list[str], source: str) -> list[tuple[str, Split]]:
    """The split of each file. A name that suggests test data but is not a documented one is refused."""
    for name in names:
        telling = name if suffix_of(name) == ".parquet" else name.rpartition("/")[0]
        if _TEST_WORD.search(telling.lower()) and not is_test(name):
            raise DataError(
                f"{source}: it is not clear whether {telling} belongs to a test split. Put test data into a folder "
                "named test, or name a Parquet file test.parquet or test-00000.parquet; rename files that are not "
                "test data."
            )
    other: Split = "train" if any(map(is_test, names)) else "any"
    return [(name, "test" if is_test(name) else other) for name in names]
