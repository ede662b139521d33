"""Where raw data comes from: the official archive, a path or bucket, or drawn from a seed."""

import logging
import os
import tempfile
import urllib.parse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from cifar_assets.dataset.formats.binary import pack_records
from cifar_assets.dataset.formats.image_tar import member_names
from cifar_assets.dataset.index import load_index, read_index, save_index
from cifar_assets.dataset.objects import RawObject, is_stored, read_state, store_object
from cifar_assets.dataset.progress import report
from cifar_assets.dataset.sources import synthetic
from cifar_assets.dataset.sources.download import (
    OFFICIAL_MD5,
    OFFICIAL_URL,
    DownloadError,
    Expected,
    check_file,
    fetch,
    split_expected,
)
from cifar_assets.dataset.sources.layouts import ARCHIVE_SUFFIXES, Entry, SourceFile, recognize, suffix_of
from resources.digests import sha256_file, sha256_json
from resources.errors import ConfigError, DataError
from resources.object_store import ObjectStore, open_store
from resources.redaction import redacted

logger = logging.getLogger(__name__)

CHOICES = (
    "Choices for CIFAR10_SOURCE: 'download' (the official archive, needs the network), 'synthetic' (drawn from a seed, "
    "needs nothing), or a path, file:// or s3:// address of the official python or binary archive, of Parquet files in "
    "the Hugging Face layout, or of a folder of class folders."
)

IMPORTS_PREFIX = "imports/"

_SHOWN_REFUSALS = 5


class Imports(BaseModel):
    """What a source was imported as. Kept for an address with a known digest, so that it is not fetched again."""

    version: Literal[1] = 1
    objects: tuple[RawObject, ...]
    unread: dict[str, str] = Field(default={}, description="Folders and files that were not read, and why, by name.")


def import_source(source: str, raw: ObjectStore, *, resize: bool = False) -> Imports:
    """Validate the source and store its objects under their digests; nothing of an invalid file is stored.

    `source` is 'download', 'synthetic' or 'synthetic:<seed>', a path, or a file://, s3:// or http(s):// address. A
    file's address may end in `#md5=...` or `#sha256=...`, which it must then have. Importing what is already stored
    stores nothing again. Raises ConfigError for a source that cannot be understood or found, DataError (naming file
    and row) for one that is damaged.
    """
    address = f"{OFFICIAL_URL}#md5={OFFICIAL_MD5}" if source == "download" else source
    remembered = _remembered(address, raw)
    if remembered:
        logger.info("%s is already stored; not fetched again.", redacted(source))
        return remembered
    unread: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="cifar-source-") as work:
        try:
            files = _source_files(address, Path(work), unread)
            objects = [_import_file(file, raw, resize, unread) for file in files]
        except DownloadError as error:
            raise DownloadError(f"Cannot fetch the raw data: {error} {CHOICES}") from error
    imported = Imports(objects=tuple(objects), unread=unread)
    if _is_pinned_url(address):
        raw.write(_import_key(address), imported.model_dump_json().encode())
    return imported


def _import_file(file: SourceFile, raw: ObjectStore, resize: bool, unread: dict[str, str]) -> RawObject:
    sha256 = sha256_file(file.path)
    known = index = load_index(raw, sha256, file.split, resize)
    if index is None:
        index = read_index(file.path, file.format, file.split, file.name, resize=resize)
    if index.refused:  # also by an index kept of a landed file of the same bytes
        raise DataError(_refusal_message(file, index.refused, len(index)))
    if not len(index):
        raise DataError(f"{file.name} holds no images.")
    unread.update({f"{file.name}, member {member}": reason for member, reason in index.unread.items()})
    key = store_object(raw, file.path, sha256, file.suffix)
    if known is None:
        save_index(raw, sha256, file.split, resize, index)
    return RawObject.model_validate(
        {
            "key": key,
            "sha256": sha256,
            "size": file.path.stat().st_size,
            "format": file.format,
            "role": "source",
            "split": file.split,
            "rows": len(index),
        }
    )


def _refusal_message(file: SourceFile, refused: dict[int, str], rows: int) -> str:
    shown_rows = list(refused)[:_SHOWN_REFUSALS]
    names = member_names(file.path) if file.format == "images" else [f"row {row}" for row in range(rows)]
    listed = "; ".join(f"{names[row]}: {refused[row]}" for row in shown_rows)
    more = f" and {len(refused) - _SHOWN_REFUSALS} more" if len(refused) > _SHOWN_REFUSALS else ""
    return (
        f"{file.name}: {len(refused)} of {rows} rows cannot be used ({listed}{more}). Correct or remove them in the "
        "source."
    )


def _source_files(address: str, work: Path, unread: dict[str, str]) -> Iterator[SourceFile]:
    if address == "synthetic" or address.startswith("synthetic:"):
        return _synthetic_files(address, work)
    base, expected = split_expected(address)
    scheme = base.partition("://")[0].lower()
    if scheme in ("http", "https", "s3"):
        try:
            base.encode()
            urllib.parse.urlsplit(base)
        except ValueError as error:
            raise ConfigError(f"Source {redacted(address)!r} is not an address: {error}. {CHOICES}") from error
    if scheme in ("http", "https"):
        target = work / "download"
        fetch(base, target, expected, parts=download_folder())
        name = urllib.parse.unquote(urllib.parse.urlsplit(base).path.rpartition("/")[2])
        return _one_file(target, name, redacted(base))
    if scheme == "s3":
        return _bucket_files(base, expected, work, unread)
    # os.path, as Path.expanduser fails for an unknown user.
    path = _file_path(base) if scheme == "file" else Path(os.path.expanduser(base))
    return _local_files(path, expected, work, unread)


def _file_path(address: str) -> Path:
    """The path of a file:// address, whose percent signs are decoded; nothing of it is dropped."""
    host, slash, path = address.partition("://")[2].partition("/")
    if host not in ("", "localhost") or not slash or {"?", "#"} & set(path):
        raise ConfigError(
            f"Source {address!r}: expected file:///folder/name, with %3F for ? and %23 for #. A plain path needs no "
            f"such care. {CHOICES}"
        )
    return Path(urllib.parse.unquote(slash + path))


def _local_files(path: Path, expected: Expected, work: Path, unread: dict[str, str]) -> Iterator[SourceFile]:
    try:
        is_file, is_folder = path.is_file(), path.is_dir()
    except OSError as error:
        raise ConfigError(f"Source {str(path)[:200]!r} cannot be looked at: {error.strerror}. {CHOICES}") from error
    if is_file:
        check_file(path, expected, str(path))
        return _one_file(path, path.name, str(path))
    if not is_folder:
        raise ConfigError(f"Source {str(path)!r} is neither a file nor a folder here. {CHOICES}")
    _refuse_digest_of_many(expected, str(path))
    try:
        entries = list(_walk(path, path, frozenset(), unread))
    except OSError as error:
        raise ConfigError(f"Source {str(path)!r}: {error.filename} cannot be read: {error.strerror}.") from error
    return recognize(entries, str(path), work, unread)


def _walk(folder: Path, root: Path, above: frozenset[Path], unread: dict[str, str]) -> Iterator[Entry]:
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
            yield Entry(name, path.stat().st_size, lambda path=path: path)
        else:
            unread[name] = "a link that leads nowhere" if path.is_symlink() else "not a file"


def _open_literally(address: str) -> ObjectStore:
    """The store at an s3:// address whose key is meant as it is written, as the tools of S3 do."""
    bucket, slash, key = address.partition("://")[2].partition("/")
    return open_store(f"s3://{bucket}{slash}{urllib.parse.quote(key)}")


def _bucket_files(address: str, expected: Expected, work: Path, unread: dict[str, str]) -> Iterator[SourceFile]:
    parent, _, name = address.rstrip("/").rpartition("/")
    if {".", ".."} & set(address.split("/")):
        raise ConfigError(f"Source {address!r}: a key with . or .. between slashes cannot be asked for over HTTP.")
    if parent.count("/") > 1:
        store = _open_literally(parent)
        if not address.endswith("/") and store.exists(name):
            target = work / "download"
            store.download(name, target, partial(report, f"downloading {address}"))
            check_file(target, expected, address)
            return _one_file(target, name, address)
    _refuse_digest_of_many(expected, address)
    store = _open_literally(address.rstrip("/"))

    def fetch_object(key: str) -> Path:
        # One object at a time lies here: what was fetched before has been stored by now.
        target = work / "object"
        store.download(key, target, partial(report, f"downloading {store.uri(key)}"))
        return target

    entries = [
        Entry(info.key, info.size, lambda key=info.key: fetch_object(key))
        for info in store.list()
        if not info.key.endswith("/")
    ]
    if not entries:
        raise ConfigError(f"Source {address!r}: no object has this key or prefix. {CHOICES}")
    return recognize(entries, address, work, unread)


def _refuse_digest_of_many(expected: Expected, address: str) -> None:
    if expected != Expected():
        raise ConfigError(
            f"Source {address!r} is not one file: #md5= and #sha256= check a single file. Leave them out, or name the "
            "file."
        )


def _one_file(path: Path, name: str, address: str) -> Iterator[SourceFile]:
    suffix = suffix_of(name)
    if suffix in ARCHIVE_SUFFIXES:
        return iter([SourceFile(path, address, "archive", "mixed", suffix)])
    if suffix == ".parquet":
        return iter([SourceFile(path, address, "parquet", "any", suffix)])
    raise ConfigError(f"Source {address!r}: expected a .tar.gz, .tgz, .tar or .parquet file, or a folder. {CHOICES}")


def _synthetic_files(source: str, work: Path) -> Iterator[SourceFile]:
    seed_text = source.partition(":")[2] or "0"
    if not seed_text.isdecimal():
        raise ConfigError(f"Source {source!r}: the seed must be a whole number, as in synthetic:7. {CHOICES}")
    for split, rows in (("train", synthetic.TRAIN_ROWS), ("test", synthetic.TEST_ROWS)):
        path = work / f"{split}.bin"
        path.write_bytes(pack_records(*synthetic.draw_split(int(seed_text), split, rows)))
        yield SourceFile(path, f"{source} ({split})", "records", split, ".bin")


def _is_pinned_url(address: str) -> bool:
    base, expected = split_expected(address)
    return base.startswith(("http://", "https://")) and expected != Expected()


def _import_key(address: str) -> str:
    return f"{IMPORTS_PREFIX}{sha256_json(address)}.json"


def _remembered(address: str, raw: ObjectStore) -> Imports | None:
    imports = read_state(raw, _import_key(address), Imports) if _is_pinned_url(address) else None
    objects = imports.objects if imports else ()
    return imports if all(is_stored(raw, item.key, item.sha256, item.size) for item in objects) else None


def download_folder() -> Path:
    """Where an interrupted download waits to be continued: CIFAR_DOWNLOADS, or .cifar/downloads."""
    folder = Path(os.environ.get("CIFAR_DOWNLOADS", ".cifar/downloads"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.gettempdir(), "cifar-downloads")
    return folder
