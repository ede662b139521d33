"""The files that make up a source: found at its address, recognized by their layout, given with a known format."""

import os
import re
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from cifar_assets.contracts import CLASSES
from cifar_assets.dataset.formats.archive import BATCHES, MAX_MEMBER_BYTES, pack_records
from cifar_assets.dataset.formats.encoded import pack_images
from cifar_assets.dataset.formats.images import DEFAULT_LIMITS
from cifar_assets.dataset.formats.names import (
    ARCHIVE_SUFFIXES,
    PICTURE_SUFFIXES,
    class_of,
    in_test_folder,
    is_test_file,
    suffix_of,
)
from cifar_assets.dataset.formats.rows import SPLITS, Split
from cifar_assets.dataset.objects import ObjectFormat
from cifar_assets.dataset.progress import report
from cifar_assets.dataset.sources import synthetic
from cifar_assets.dataset.sources.download import check_file, fetch, split_digest
from resources.errors import ConfigError, DataError
from resources.object_store import ObjectStore, open_store
from resources.redaction import redacted

CHOICES = (
    "Choices for CIFAR10_SOURCE: 'download' (the official archive, needs the network), 'synthetic' (drawn from a seed, "
    "needs nothing), or a path, file:// or s3:// address of the official python or binary archive, of Parquet files in "
    "the Hugging Face layout, or of a folder of class folders."
)

_PACK_IMAGES = 20_000
"""Images per packed object, so that one object stays easy to move."""
_TEST_WORDS = ("test", "tests", "testing")


@dataclass(frozen=True)
class SourceFile:
    """A local file of known format, ready to be validated and stored."""

    path: Path
    name: str
    format: ObjectFormat
    split: Split | Literal["mixed"]
    suffix: str


@dataclass(frozen=True)
class _Entry:
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


def source_files(address: str, work: Path, unread: dict[str, str]) -> Iterator[SourceFile]:
    """The files at an address, one at a time: a file in the folder `work` is gone when the next one is asked for.

    `unread` gets what is there and not part of the layout, and why. Raises ConfigError for an address that cannot be
    understood or found, DataError for a layout that is not known.
    """
    base, digest = split_digest(address)
    scheme = base.partition("://")[0].lower() if "://" in base else ""
    if scheme in ("http", "https", "s3"):
        try:
            base.encode()
            name = urllib.parse.unquote(urllib.parse.urlsplit(base).path.rpartition("/")[2])
        except ValueError as error:
            raise ConfigError(f"Source {redacted(address)!r} is not an address: {error}. {CHOICES}") from error
        if scheme == "s3":
            return _bucket_files(base, digest, work, unread)
        target = work / "download"
        fetch(base, target, digest)
        return iter([_one_file(target, name, redacted(base))])
    if address == "synthetic" or address.startswith("synthetic:"):
        return _synthetic_files(address, work)
    # os.path, as Path.expanduser fails for an unknown user.
    path = _file_path(base) if scheme == "file" else Path(os.path.expanduser(base))
    return _local_files(path, digest, work, unread)


def _synthetic_files(address: str, work: Path) -> Iterator[SourceFile]:
    seed = address.partition(":")[2] or "0"
    if not seed.isdecimal():
        raise ConfigError(f"Source {address!r}: the seed must be a whole number, as in synthetic:7. {CHOICES}")
    splits: tuple[tuple[Split, int], ...] = (("train", synthetic.TRAIN_ROWS), ("test", synthetic.TEST_ROWS))
    for split, rows in splits:
        path = work / f"{split}.bin"
        path.write_bytes(pack_records(*synthetic.draw_split(int(seed), split, rows)))
        yield SourceFile(path, f"{address} ({split})", "records", split, ".bin")


def _file_path(address: str) -> Path:
    """The path of a file:// address, whose percent signs are decoded; nothing of it is dropped."""
    host, slash, path = address.partition("://")[2].partition("/")
    if host not in ("", "localhost") or not slash or {"?", "#"} & set(path):
        raise ConfigError(
            f"Source {address!r}: expected file:///folder/name (%3F for ?, %23 for #) or a plain path. {CHOICES}"
        )
    return Path(urllib.parse.unquote(slash + path))


def _local_files(path: Path, digest: str, work: Path, unread: dict[str, str]) -> Iterator[SourceFile]:
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except OSError as error:
        raise ConfigError(f"Source {str(path)[:200]!r} cannot be looked at: {error.strerror}. {CHOICES}") from error
    if is_file:
        check_file(path, digest, str(path))
        return iter([_one_file(path, path.name, str(path))])
    if not is_folder:
        raise ConfigError(f"Source {str(path)!r} is neither a file nor a folder here. {CHOICES}")
    _refuse_digest_of_many(digest, str(path))
    try:
        entries = list(_walk(path, path, frozenset(), unread))
    except OSError as error:
        raise ConfigError(f"Source {str(path)!r}: {error.filename} cannot be read: {error.strerror}.") from error
    return _recognize(entries, str(path), work, unread)


def _walk(folder: Path, root: Path, above: frozenset[Path], unread: dict[str, str]) -> Iterator[_Entry]:
    """The files below a folder, through links as well. What is not a file is noted in `unread`."""
    above |= {folder.resolve()}
    for path in sorted(folder.iterdir()):
        name = path.relative_to(root).as_posix()
        if not name.isascii() and name != name.encode(errors="replace").decode():
            unread[name.encode(errors="backslashreplace").decode()] = "the name is not UTF-8"
        elif path.is_dir() and path.name.startswith("."):
            unread[name] = "hidden"
        elif path.is_dir() and path.resolve() in above:
            unread[name] = "a link to a folder above it"
        elif path.is_dir():
            yield from _walk(path, root, above, unread)
        elif path.is_file():
            yield _Entry(name, path.stat().st_size, lambda path=path: path)
        else:
            unread[name] = "a link that leads nowhere" if path.is_symlink() else "not a file"


def _bucket_files(address: str, digest: str, work: Path, unread: dict[str, str]) -> Iterator[SourceFile]:
    if {".", ".."} & set(address.split("/")):
        raise ConfigError(f"Source {address!r}: a key with . or .. between slashes cannot be asked for over HTTP.")
    parent, _, name = address.rstrip("/").rpartition("/")
    target = work / "object"
    if parent.count("/") > 1 and not address.endswith("/"):
        store = _open_literally(parent)
        if store.exists(name):
            store.download(name, target, partial(report, f"downloading {address}"))
            check_file(target, digest, address)
            return iter([_one_file(target, name, address)])
    _refuse_digest_of_many(digest, address)
    store = _open_literally(address.rstrip("/"))

    def fetch_object(key: str) -> Path:
        # One object at a time lies here: what was fetched before has been stored by now.
        store.download(key, target, partial(report, f"downloading {store.uri(key)}"))
        return target

    infos = [info for info in store.list() if not info.key.endswith("/")]
    if not infos:
        raise ConfigError(f"Source {address!r}: no object has this key or prefix. {CHOICES}")
    entries = [_Entry(info.key, info.size, partial(fetch_object, info.key)) for info in infos]
    return _recognize(entries, address, work, unread)


def _open_literally(address: str) -> ObjectStore:
    """The store at an s3:// address whose key is meant as it is written, as the tools of S3 do."""
    bucket, slash, key = address.partition("://")[2].partition("/")
    return open_store(f"s3://{bucket}{slash}{urllib.parse.quote(key)}")


def _refuse_digest_of_many(digest: str, address: str) -> None:
    if digest:
        raise ConfigError(f"Source {address!r} is not one file: leave #md5= or #sha256= out, or name the file.")


def _one_file(path: Path, name: str, address: str) -> SourceFile:
    suffix = suffix_of(name)
    if suffix in ARCHIVE_SUFFIXES:
        return SourceFile(path, address, "archive", "mixed", suffix)
    if suffix == ".parquet":
        return SourceFile(path, address, "parquet", "any", suffix)
    raise ConfigError(f"Source {address!r}: expected a .tar.gz, .tgz, .tar or .parquet file, or a folder. {CHOICES}")


def _recognize(entries: list[_Entry], name: str, work: Path, unread: dict[str, str]) -> Iterator[SourceFile]:
    """The files that make up a folder or prefix. DataError when the layout is none of those known."""
    hidden = {entry.name for entry in entries if any(part.startswith(".") for part in entry.name.split("/"))}
    unread.update(dict.fromkeys(hidden, "hidden"))
    entries = sorted((entry for entry in entries if entry.name not in hidden), key=lambda entry: entry.name)
    parquet = [entry for entry in entries if suffix_of(entry.name) == ".parquet"]
    archives = [entry for entry in entries if suffix_of(entry.name) in ARCHIVE_SUFFIXES]
    batches = [entry for entry in entries if _base(entry).startswith(("data_batch_", "test_batch", "batches.meta"))]
    pictures = [entry for entry in entries if suffix_of(entry.name) in PICTURE_SUFFIXES]
    images = [entry for entry in pictures if class_of(entry.name) is not None]
    if parquet:
        kind, used, files = "the Parquet files", parquet, _parquet_shards(parquet, name)
    elif len(archives) == 1:
        kind, used = "the archive", archives
        files = iter([_one_file(archives[0].fetch(), archives[0].name, archives[0].name)])
    elif archives:
        found = ", ".join(entry.name for entry in archives)
        raise DataError(f"{name} holds several archives ({found}): name the one to use.")
    elif any(_base(entry).removesuffix(".bin") in BATCHES for entry in batches):
        kind, used, files = "the archive", batches, _packed_batches(batches, name, work)
    elif images:
        kind, used, files = "images in class folders", images, _packed_class_folders(images, name, work)
    else:
        shown = ", ".join(entry.name for entry in entries[:5]) or "nothing"
        raise DataError(
            f"{name} is not a dataset known here: found {shown}. Expected the official archive (.tar.gz) or its "
            f"batches, Parquet files in the Hugging Face layout, or folders named {', '.join(CLASSES[:3])}, ... with "
            "images, with or without train/ and test/ above them."
        )
    names = {entry.name for entry in used}
    unread.update({entry.name: f"only {kind} are read" for entry in entries if entry.name not in names})
    return files


def _base(entry: _Entry) -> str:
    return entry.name.rpartition("/")[2]


def _packed_batches(entries: list[_Entry], name: str, work: Path) -> Iterator[SourceFile]:
    target = work / "batches.tar"
    pack_images(target, ((entry.name, entry.read(MAX_MEMBER_BYTES)) for entry in entries))
    yield SourceFile(target, name, "archive", "mixed", ".tar")


def _parquet_shards(entries: list[_Entry], name: str) -> Iterator[SourceFile]:
    for entry, split in _with_splits(entries, is_test_file, name):
        yield SourceFile(entry.fetch(), entry.name, "parquet", split, ".parquet")


def _packed_class_folders(entries: list[_Entry], name: str, work: Path) -> Iterator[SourceFile]:
    pairs, done = _with_splits(entries, in_test_folder, name), 0
    for split in SPLITS:
        group = [entry for entry, its_split in pairs if its_split == split]
        for start in range(0, len(group), _PACK_IMAGES):
            part, target = group[start : start + _PACK_IMAGES], work / f"{split}-{start}.tar"
            pack_images(target, ((entry.name, entry.read(DEFAULT_LIMITS.max_bytes)) for entry in part))
            done += len(part)
            report(f"packing {name}", done, len(entries))
            shown = f"{name} ({split} images {start} to {start + len(part) - 1})"
            yield SourceFile(target, shown, "images", split, ".tar")
            target.unlink()


def _with_splits(entries: list[_Entry], is_test: Callable[[str], bool], name: str) -> list[tuple[_Entry, Split]]:
    """The split of each entry. A name that may mean test, but is not one of those documented, is refused."""
    other: Split = "train" if any(is_test(entry.name) for entry in entries) else "any"
    pairs: list[tuple[_Entry, Split]] = []
    for entry in entries:
        path = entry.name if is_test is is_test_file else entry.name.rpartition("/")[0]
        for part in path.lower().removesuffix(".parquet").split("/"):
            words = [word for word in re.findall("[a-z]+", part) if word != "of"]
            if words and {words[0], words[-1]} & {*_TEST_WORDS} and not is_test(entry.name):
                raise DataError(
                    f"{name}: it is not clear whether {path} belongs to a test split. Put test data into a folder "
                    "named test, or name a Parquet file test.parquet or test-00000.parquet; rename what is not test "
                    "data."
                )
        pairs.append((entry, "test" if is_test(entry.name) else other))
    return pairs
