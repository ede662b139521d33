"""Examining landed objects one by one, without reading again what has not changed since."""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, Field

from cifar_assets.contracts import CLASSES, LANDING_PREFIX
from cifar_assets.dataset.formats.images import check_size
from cifar_assets.dataset.formats.isolated import ReaderFailedError, ask
from cifar_assets.dataset.formats.names import (
    ARCHIVE_SUFFIXES,
    PICTURE_SUFFIXES,
    class_of,
    in_test_folder,
    is_test_file,
    suffix_of,
)
from cifar_assets.dataset.formats.pickles import HostileDataError
from cifar_assets.dataset.formats.rows import SPLITS
from cifar_assets.dataset.index import PREPARATION, ObjectIndex, load_index, read_index, save_index
from cifar_assets.dataset.objects import OBJECTS_PREFIX, ObjectFormat, RawObject, is_present, read_state, store_object
from resources.digests import sha256_file, sha256_stream
from resources.errors import DataError, ObjectNotFoundError
from resources.object_store import ObjectInfo, ObjectStore

_MEMORY_KEY = "landing-memory.json"


@dataclass(frozen=True)
class NotJudged:
    """An object not judged this time: it is gone, still being written, or a reader failed on it."""

    reason: str
    reader_failed: bool = False


@dataclass(frozen=True)
class Refused:
    """An object that cannot be read as what its name says."""

    sha256: str
    reason: str
    hostile: bool = False


@dataclass(frozen=True)
class LandedTable:
    """A Parquet file or archive, stored under its digest, and its rows' index."""

    item: RawObject
    index: ObjectIndex


@dataclass(frozen=True)
class LandedImage:
    """A single image in a class folder."""

    key: str
    sha256: str
    label: int
    is_test: bool
    pixels: str
    """Pixel digest, hex."""

    def index(self) -> ObjectIndex:
        """The index of a one-row object."""
        return ObjectIndex(
            np.frombuffer(bytes.fromhex(self.pixels), np.uint8).reshape(1, 32),
            np.array([self.label]),
            np.array([SPLITS.index("test" if self.is_test else "train")], np.uint8),
            {},
        )

    @property
    def identity(self) -> str:
        """The same for copies under other names, as long as these say the same of it."""
        return f"{self.sha256}:{self.label}:{'test' if self.is_test else 'train'}"

    @property
    def member(self) -> str:
        """Its name in a packed object, free of the name it landed under."""
        return f"{CLASSES[self.label]}/{self.sha256}"


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


def examine(
    raw: ObjectStore, infos: Sequence[ObjectInfo], resize: bool
) -> Iterator[tuple[ObjectInfo, NotJudged | Refused | LandedTable | LandedImage]]:
    """Judge each object on its own. Good tables are stored under their digests on the way."""
    before = _load_memory(raw, resize)
    memory = _Memory(preparation=before.preparation)
    for info in infos:
        seen = before.seen.get(info.key)
        sha256 = seen.sha256 if seen and (seen.etag, seen.size) == (info.etag, info.size) else None
        is_image = suffix_of(info.key) in PICTURE_SUFFIXES
        remembered = _recall(raw, info, sha256, before, resize, is_image) if sha256 else None
        found = remembered or _read(raw, info, resize, is_image)
        if isinstance(found, LandedTable | LandedImage):
            content = found.item.sha256 if isinstance(found, LandedTable) else found.sha256
            memory.seen[info.key] = _Seen(etag=info.etag, size=info.size, sha256=content)
            if isinstance(found, LandedImage):
                memory.pixels[content] = found.pixels
        yield info, found
    if memory != before:
        raw.write(_MEMORY_KEY, memory.model_dump_json().encode())


def _recall(
    raw: ObjectStore, info: ObjectInfo, sha256: str, memory: _Memory, resize: bool, is_image: bool
) -> LandedTable | LandedImage | None:
    if is_image:
        pixels = memory.pixels.get(sha256)
        return _image(info.key, sha256, pixels) if pixels else None
    kind, split = _table_kind(info.key)
    index = load_index(raw, sha256, split, resize)
    key = next((key for key in _possible_keys(sha256, kind) if is_present(raw, key, info.size)), None)
    if index is None or key is None:
        return None
    return LandedTable(_item(key, sha256, info.size, kind, split, len(index)), index)


def _read(
    raw: ObjectStore, info: ObjectInfo, resize: bool, is_image: bool
) -> NotJudged | Refused | LandedTable | LandedImage:
    try:
        found = _judge_image(raw, info, resize) if is_image else _judge_table(raw, info, resize)
    except ObjectNotFoundError:
        return NotJudged("removed while it was being read")
    now = raw.stat(info.key)
    if now is None or (now.etag, now.size) != (info.etag, info.size):
        return NotJudged("changed while it was being read: looked at again next time")
    return found


def _judge_image(raw: ObjectStore, info: ObjectInfo, resize: bool) -> NotJudged | Refused | LandedImage:
    with raw.open(info.key) as file:
        sha256 = sha256_stream(file)
        file.seek(0)
        try:
            check_size(info.size)
            pixels, _ = ask("digest_picture", {"resize": resize}, info.key, payload=file.read(), num_bytes=info.size)
        except DataError as error:
            return Refused(sha256, str(error))
        except ReaderFailedError as error:
            return NotJudged(str(error), reader_failed=True)
    return _image(info.key, sha256, pixels)


def _judge_table(raw: ObjectStore, info: ObjectInfo, resize: bool) -> NotJudged | Refused | LandedTable:
    kind, split = _table_kind(info.key)
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if info.size > free:
        reason = f"has {info.size:,} bytes, but {tempfile.gettempdir()} has room for {free:,}: set TMPDIR, or remove it"
        return NotJudged(reason, reader_failed=True)
    with tempfile.TemporaryDirectory(prefix="cifar-landed-") as folder:
        path = Path(folder, "object")
        raw.download(info.key, path)
        sha256 = sha256_file(path)
        index = load_index(raw, sha256, split, resize)
        if index is None:
            try:
                index = read_index(path, kind, split, info.key, resize=resize)
            except DataError as error:
                return Refused(sha256, str(error), hostile=isinstance(error, HostileDataError))
            except ReaderFailedError as error:
                # A reader that met what nobody thought of is not a reason to stop every build.
                return NotJudged(str(error), reader_failed=True)
        if not len(index):
            return Refused(sha256, f"{info.key} holds no rows.")
        if len(index.refused) < len(index):
            item = _store(raw, path, kind, split, _suffix(path, kind), len(index))
        else:
            item = _item(f"{OBJECTS_PREFIX}{sha256}{_suffix(path, kind)}", sha256, info.size, kind, split, len(index))
        save_index(raw, sha256, split, resize, index)
    return LandedTable(item, index)


def _image(key: str, sha256: str, pixels: str) -> LandedImage:
    label = class_of(key.removeprefix(LANDING_PREFIX))
    if label is None:
        raise DataError(f"{key} is in no class folder.")
    return LandedImage(key, sha256, label, in_test_folder(key.removeprefix(LANDING_PREFIX)), pixels)


def _table_kind(key: str) -> tuple[ObjectFormat, str]:
    if suffix_of(key) in ARCHIVE_SUFFIXES:
        return "archive", "mixed"
    return "parquet", "test" if is_test_file(key.removeprefix(LANDING_PREFIX)) else "train"


def _suffix(path: Path, kind: ObjectFormat) -> str:
    """The stored object's suffix, by content: the name something landed under must not matter."""
    if kind != "archive":
        return f".{kind}"
    with path.open("rb") as file:
        return ".tar.gz" if file.read(2) == b"\x1f\x8b" else ".tar"


def _possible_keys(sha256: str, kind: ObjectFormat) -> list[str]:
    suffixes = (".tar.gz", ".tar") if kind == "archive" else (f".{kind}",)
    return [f"{OBJECTS_PREFIX}{sha256}{suffix}" for suffix in suffixes]


def _store(raw: ObjectStore, path: Path, kind: ObjectFormat, split: str, suffix: str, rows: int) -> RawObject:
    sha256 = sha256_file(path)
    return _item(store_object(raw, path, sha256, suffix), sha256, path.stat().st_size, kind, split, rows)


def _item(key: str, sha256: str, size: int, kind: ObjectFormat, split: str, rows: int) -> RawObject:
    return RawObject.model_validate(
        {"key": key, "sha256": sha256, "size": size, "format": kind, "role": "landed", "split": split, "rows": rows}
    )


def _load_memory(raw: ObjectStore, resize: bool) -> _Memory:
    preparation = f"{PREPARATION}{'r' if resize else 's'}"
    memory = read_state(raw, _MEMORY_KEY, _Memory)
    return memory if memory and memory.preparation == preparation else _Memory(preparation=preparation)
