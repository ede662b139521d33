"""Finds the files of a source at its address and recognizes their layout and format."""

import re
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Literal

from cifar_assets.dataset.formats.archive import pack_records
from cifar_assets.dataset.formats.encoded import pack_images
from cifar_assets.dataset.formats.images import SOURCE_LIMITS
from cifar_assets.dataset.formats.names import (
    ARCHIVE_SUFFIXES,
    PICTURE_SUFFIXES,
    SPLIT_FOLDERS,
    class_folders,
    class_of,
    folder_name,
    split_of,
    suffix_of,
)
from cifar_assets.dataset.formats.rows import SPLITS, Split
from cifar_assets.dataset.objects import LINKED_FOLDER, UNREADABLE_FOLDER, ObjectFormat, printable, unlisted
from cifar_assets.dataset.sources import synthetic
from cifar_assets.dataset.sources.download import CHOICES, check_file, fetch, split_digest
from resources.errors import ConfigError, DataError
from resources.object_store import ObjectStore, locate
from resources.redaction import redacted

_PACK_IMAGES, _PACK_BYTES = 20_000, 512 << 20
"""Limits of a packed object, so that it stays easy to move."""
_SPLIT_WORD = re.compile("(?<![a-z])(test(s|ing)?|val|valid(ation)?)(?![a-z])")
_LOST_AND_FOUND = "lost+found"
"""The folder of a file system's own, which only root can read."""


@dataclass(frozen=True)
class SourceFile:
    """A local file of known format, ready to be validated and stored."""

    path: Path
    name: str
    format: ObjectFormat
    split: Split | Literal["mixed"]
    suffix: str
    classes: tuple[str, ...] | None = None
    """Class names, where folders give them."""


def source_files(
    address: str, work: Path, unread: dict[str, str], classes: tuple[str, ...] | None
) -> Iterator[SourceFile]:
    """The files at an address, one at a time: a file in the folder `work` is deleted when the next one is requested.

    `unread` receives what is not part of the layout, with the reason. Of class folders, only those of `classes` are
    read, if that is given. Raises ConfigError for an address that is invalid or does not exist, DataError for an
    unknown layout or a class that is missing.
    """
    if address == "synthetic" or address.startswith("synthetic:"):
        yield from _synthetic_files(address, work, classes or synthetic.CLASSES)
        return
    base, digest = split_digest(address)
    if base.startswith(("http://", "https://")):
        fetch(base, work / "object", digest)
        yield _one_file(work / "object", urllib.parse.unquote(urllib.parse.urlsplit(base).path), redacted(base))
        return
    try:
        store, key = locate(base)
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
        yield from _folder_files(store, f"{key}/" if key else "", base, work, unread, classes)


def _synthetic_files(address: str, work: Path, classes: tuple[str, ...]) -> Iterator[SourceFile]:
    seed = address.partition(":")[2] or "0"
    if not seed.isdecimal():
        raise ConfigError(f"Source {address!r}: the seed must be a whole number, as in synthetic:7. {CHOICES}")
    if len(classes) > len(synthetic.CLASSES):
        raise ConfigError(
            f"Source {address!r} draws at most {len(synthetic.CLASSES)} classes, not {len(classes)}. {CHOICES}"
        )
    splits: tuple[tuple[Split, int], ...] = (("train", synthetic.TRAIN_ROWS), ("test", synthetic.TEST_ROWS))
    for split, rows in splits:
        path = work / f"{split}.bin"
        path.write_bytes(pack_records(*synthetic.draw_split(int(seed), split, rows, len(classes))))
        yield SourceFile(path, f"{address} ({split})", "records", split, ".bin", classes)


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
    store: ObjectStore,
    prefix: str,
    source: str,
    work: Path,
    unread: dict[str, str],
    wanted: tuple[str, ...] | None,
) -> Iterator[SourceFile]:
    """The files of a folder or prefix: Parquet, or images in class folders."""
    unread.update({key.removeprefix(prefix): reason for key, reason in unlisted(store, prefix).items()})
    sizes = {info.key.removeprefix(prefix): info.size for info in store.list(prefix) if not info.key.endswith("/")}
    visible = [name for name in sizes if printable(name) not in unread and "/." not in f"/{name}"]
    pictures = [name for name in visible if suffix_of(name) in PICTURE_SUFFIXES]
    classes = wanted or class_folders(pictures)
    for name, reason in unread.items():
        if "/." in f"/{name}":
            continue
        if reason == LINKED_FOLDER:  # it may be the test split
            raise DataError(f"{source}: {name} is {reason}, or remove the link.")
        if _is_part(name, reason.startswith(UNREADABLE_FOLDER), classes):
            raise DataError(
                f"{source}: {name} cannot be read ({reason}), and may hold a split or a class. Make it readable, or "
                "remove it."
            )
    if not sizes and not unread:
        raise ConfigError(f"Source {source!r}: there is no file, folder, object or prefix with this name. {CHOICES}")
    unread.update({name: "hidden" for name in sizes if "/." in f"/{name}"})
    parquet = [name for name in visible if suffix_of(name) == ".parquet"]
    if not parquet:
        _check_names(classes, pictures, source)
    images = [name for name in pictures if class_of(name, classes) is not None]
    used = parquet or images
    if not used:
        found = [*visible, *(f"{name} ({reason})" for name, reason in unread.items())]
        shown = f" ({', '.join(wanted[:3])}, ...)" if wanted else ""
        raise DataError(
            f"{source} is not a recognized dataset: found {', '.join(found[:5])}. Expected Parquet files in the Hugging"
            f" Face layout, or a folder of images for each class{shown}, with or without train/, validation/ "
            "and test/ above them. For an official archive, name the file, not its folder."
        )
    kind = "Parquet files" if parquet else "images in class folders"
    unread.update({name: f"only {kind} are read" for name in visible if name not in set(used)})
    pairs = _with_splits(used, source, () if parquet else classes, bool(wanted))
    if parquet:
        for name, split in pairs:
            path = _local_copy(store, prefix + name, work)
            yield SourceFile(path, name, "parquet", split, ".parquet")
        return
    _check_folders(classes, images, source, bool(wanted))
    for name in images:
        if sizes[name] > SOURCE_LIMITS.max_bytes:
            limit = f"at most {SOURCE_LIMITS.max_bytes:,} are read. Remove or correct it."
            raise DataError(f"{name} has {sizes[name]:,} bytes; {limit}")
    packs = _packed_class_folders(pairs, sizes, lambda name: _local_copy(store, prefix + name, work), source, work)
    yield from (replace(pack, classes=classes) for pack in packs)


def _check_names(classes: tuple[str, ...], pictures: list[str], source: str) -> None:
    """DataError where the name of a folder may be that of a class or of a split."""
    if clash := next((name for name in classes if folder_name(name).lower() in SPLIT_FOLDERS), None):
        raise DataError(f"{source}: the class {clash} has the name of a split. Rename it, in its folders too.")
    for name in pictures:
        folder, _, base = name.rpartition("/")
        split = folder.rpartition("/")[2]
        if split.lower() in SPLIT_FOLDERS and class_of(name, classes) is None:
            raise DataError(
                f"{source}: {name} is in a folder with the name of a split, but in no class folder. Put it into "
                f"{split}/<class>/{base}, rename the folder {split} if it is a class, or remove it."
            )


def _check_folders(classes: tuple[str, ...], images: list[str], source: str, declared: bool) -> None:
    """DataError where a class has no images, or two folders differ in case only."""
    found = {class_of(name, classes) for name in images}
    missing = [name for label, name in enumerate(classes) if label not in found]
    if missing:
        way = "correct the list of classes" if declared else "declare the classes in DATA_SETS if it is not CIFAR-10"
        raise DataError(f"{source} has no images of {', '.join(missing)}. Complete the source, or {way}.")
    lower = sorted(folder_name(name).lower() for name in classes)
    if double := next((name for name, following in pairwise(lower) if name == following), None):
        raise DataError(f"{source} has several class folders {double!r} that differ in case only: rename them.")


def _is_part(name: str, is_folder: bool, classes: tuple[str, ...]) -> bool:
    """Whether what cannot be read may be a Parquet file, or a folder of a split or class or in one."""
    if is_folder:
        return name.rpartition("/")[2] != _LOST_AND_FOUND
    base = name.rpartition("/")[2]
    return bool(split_of(f"{base}/")) or class_of(f"{base}/", classes) is not None or suffix_of(name) == ".parquet"


def _packed_class_folders(
    pairs: list[tuple[str, Split]], sizes: Mapping[str, int], fetch: Callable[[str], Path], source: str, work: Path
) -> Iterator[SourceFile]:
    for split in SPLITS:
        group = [name for name, its_split in pairs if its_split == split]
        start = 0
        while start < len(group):
            totals = accumulate(sizes[name] for name in group[start : start + _PACK_IMAGES])
            part = group[start : start + max(1, sum(total <= _PACK_BYTES for total in totals))]
            target = work / f"{split}-{start}.tar"
            pack_images(target, ((name, fetch(name).read_bytes()) for name in part))
            shown = f"{source} ({split} images {start} to {start + len(part) - 1})"
            yield SourceFile(target, shown, "images", split, ".tar")
            target.unlink()
            start += len(part)


def _with_splits(names: list[str], source: str, classes: tuple[str, ...], declared: bool) -> list[tuple[str, Split]]:
    """The split of each file. A name that suggests a split but is not a documented one is refused.

    The names of class folders suggest none: of undeclared classes only that of the picture's own folder, because
    `test_images/cat/` would be a class too.
    """
    for name in names:
        telling = name if suffix_of(name) == ".parquet" else name.rpartition("/")[0]
        if _SPLIT_WORD.search(telling.lower()):
            *above, last = telling.split("/")
            parts = [*above, last] if declared else [last]
            named = [part for part in parts if class_of(f"{part}/", classes) is not None]
            telling = "/".join(part for part in [*above, last] if part not in named)
        if (found := _SPLIT_WORD.search(telling.lower())) and split_of(name) in (None, "train"):
            split = "test" if found[1].startswith("test") else "validation"
            raise DataError(
                f"{source}: it is not clear whether {telling} belongs to a {split} split. Put {split} data into a "
                f"folder named {split}, or name a Parquet file {split}.parquet or {split}-00000.parquet; rename files "
                f"that are not {split} data."
            )
    splits = [split_of(name) for name in names]
    other: Split = "train" if "test" in splits else "any"
    return [
        (name, split if split in ("test", "validation") else other) for name, split in zip(names, splits, strict=True)
    ]
