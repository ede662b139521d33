"""The official CIFAR-10 archives, python and binary. Members are read in place: nothing is ever unpacked to disk.

A binary record is one label byte, then 3072 bytes of one image: red, green and blue planes, row by row.
"""

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from cifar_assets.contracts import CLASSES, IMAGE_SHAPE
from cifar_assets.dataset.formats.pickles import HostileDataError, load_fields
from cifar_assets.dataset.formats.rows import RowBatch, pixel_batches
from resources.errors import DataError

PYTHON_FOLDER = "cifar-10-batches-py"
BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
MAX_MEMBER_BYTES = 64 << 20
MAX_UNPACKED_BYTES = 1 << 30
MAX_HEADER_BYTES = 1 << 20
"""Bounds against archives that unpack to far more than CIFAR-10 (186 MB, 31 MB per batch), or hold it in memory."""

_META = ("batches.meta", "batches.meta.txt")
_MAX_UNREAD = 1000
_NOT_UNPACKED = "Nothing was unpacked; do not use the archive, fetch it from its source again."
_IMAGE_BYTES = int(np.prod(IMAGE_SHAPE))
_READ_ERRORS = (EOFError, OSError, ValueError, tarfile.TarError, zlib.error)

_Rows = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images (N x 3 x 32 x 32) and their labels."""


def read_archive(path: Path, name: str, unread: dict[str, str] | None = None) -> Iterator[RowBatch]:
    """Rows of a `.tar`, `.tar.gz` or `.tgz` in the official layout, in the order of its members.

    `name` is what errors call the archive; `unread` gets the members that are not read, and why. HostileDataError for a
    member that leads outside the folder, is not a plain file or asks for code to be run; DataError for other faults.
    """
    first_row, seen = 0, set[str]()
    with path.open("rb") as file:
        stream = _Bounded(_unpacked(file, name), name)
        try:
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    # tarfile reads the headers up to the next member in one piece, as long as they claim to be.
                    stream.limit = min(stream.count + member.size + MAX_HEADER_BYTES, MAX_UNPACKED_BYTES)
                    where = f"{name}, member {member.name!r}"
                    base, content = _checked_name(member, where), archive.extractfile(member)
                    stem = base.removesuffix(".bin")
                    if stem in BATCHES and content:
                        if stem in seen:
                            raise DataError(f"{name} holds {stem} twice: which one counts is not clear.")
                        seen.add(stem)
                        images, labels = _parse_batch(base, content.read(), where)
                        yield from pixel_batches(images, labels, "test" if stem == BATCHES[-1] else "train", first_row)
                        first_row += len(labels)
                    elif base in _META and content:
                        _check_meta(base, content.read(), where)
                    elif content and unread is not None and len(unread) < _MAX_UNREAD:
                        unread[member.name] = "not a batch"
            # tarfile stops at its end mark; gzip checks length and checksum at its own.
            stream.limit = MAX_UNPACKED_BYTES
            while stream.read(1 << 20):
                pass
        except _READ_ERRORS as error:
            raise DataError(
                f"{name} is cut off or damaged: {path.stat().st_size:,} bytes received, {stream.count:,} bytes "
                f"unpacked, batches read so far: {', '.join(sorted(seen)) or 'none'} ({error}). "
                "Fetch or upload it again."
            ) from error
    missing = [batch for batch in BATCHES if batch not in seen]
    if missing:
        raise DataError(
            f"{name} is not the official CIFAR-10 layout or is cut off: expected {len(BATCHES)} batches, "
            f"got {len(seen)}; missing {', '.join(missing)}."
        )


def parse_records(data: bytes, where: str) -> _Rows:
    """Images and labels of binary records. DataError when the data ends within a record."""
    if len(data) % (1 + _IMAGE_BYTES):
        raise DataError(f"{where} is cut off: {len(data):,} bytes are not whole records of {1 + _IMAGE_BYTES} bytes.")
    records = np.frombuffer(data, dtype=np.uint8).reshape(-1, 1 + _IMAGE_BYTES)
    return records[:, 1:].reshape(-1, *IMAGE_SHAPE), records[:, 0].astype(np.int64)


def pack_records(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> bytes:
    """The inverse of `parse_records`."""
    return np.concatenate([labels.astype(np.uint8)[:, None], images.reshape(len(images), -1)], axis=1).tobytes()


def _unpacked(file: IO[bytes], name: str) -> IO[bytes] | gzip.GzipFile:
    start = file.read(512)
    file.seek(0)
    if start[:2] == b"\x1f\x8b":
        return gzip.GzipFile(fileobj=file)
    if start[257:262] == b"ustar":
        return file
    if not start:
        raise DataError(f"{name} is empty (0 bytes): fetch or upload it again.")
    raise DataError(
        f"{name} is not a tar archive: it starts with {start[:24]!r}. An error page saved in place of the archive "
        "looks like this; fetch or upload it again."
    )


def _checked_name(member: tarfile.TarInfo, where: str) -> str:
    """The last part of a file's name, empty for a folder. Refuses what an unpacking tool could be tricked with."""
    parts = member.name.replace("\\", "/").split("/")
    if member.name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0] or "\0" in member.name:
        raise HostileDataError(f"{where} points outside the archive's folder. {_NOT_UNPACKED}")
    if member.isdir():
        return ""
    if not member.isreg():
        kind = "link" if member.issym() or member.islnk() else "device or special file"
        raise HostileDataError(f"{where} is a {kind}; the official archive holds plain files only. {_NOT_UNPACKED}")
    base = parts[-1]
    is_wanted = base.removesuffix(".bin") in BATCHES or base in _META
    if not is_wanted and base.startswith(("data_batch", "test_batch")):
        raise DataError(f"{where} is not a batch of the official archive, {', '.join(BATCHES)}. Remove or rename it.")
    if is_wanted and member.size > MAX_MEMBER_BYTES:
        raise DataError(f"{where} claims {member.size:,} bytes; at most {MAX_MEMBER_BYTES:,} are read.")
    return base


def _parse_batch(batch_name: str, data: bytes, where: str) -> _Rows:
    images, labels = parse_records(data, where) if batch_name.endswith(".bin") else _parse_pickle(data, where)
    if not len(images):
        raise DataError(f"{where} holds no images. Fetch or upload the archive again.")
    return images, labels


def _parse_pickle(data: bytes, where: str) -> _Rows:
    fields = load_fields(data, where)
    pixels, labels = fields.get("data"), fields.get("labels")
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (_IMAGE_BYTES,):
        raise DataError(f"{where}: expected data as a uint8 array N x {_IMAGE_BYTES}, got {_kind(pixels)}.")
    if isinstance(labels, list) and all(type(label) is int for label in labels):
        labels = np.asarray(labels, None if labels else np.int64)
    if not isinstance(labels, np.ndarray) or labels.shape != (len(pixels),) or labels.dtype.kind not in "iu":
        raise DataError(f"{where}: expected {len(pixels)} integer labels, got {_kind(labels)}.")
    return pixels.reshape(-1, *IMAGE_SHAPE), labels.astype(np.int64)


def _kind(value: object) -> str:
    """What a value is, in a few words: it may be of any size."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, list) else "")


def _check_meta(base: str, data: bytes, where: str) -> None:
    if base.endswith(".txt"):
        names = data.decode("ascii", "replace").split()
    else:
        label_names = load_fields(data, where).get("label_names")
        names = label_names if isinstance(label_names, list) else []
        names = [name.decode("latin1") if isinstance(name, bytes) else name for name in names]
    if tuple(names) != CLASSES:
        shown = [name[:20] if isinstance(name, str) else _kind(name) for name in names[: len(CLASSES) + 1]]
        raise DataError(f"{where}: label names are {shown}; expected {list(CLASSES)}. Labels would mean other classes.")


class _Bounded(io.RawIOBase):
    """A stream that counts what it gives and stops at a limit, which may be moved."""

    def __init__(self, stream: IO[bytes] | gzip.GzipFile, name: str):
        self._stream, self._name = stream, name
        self.limit, self.count = MAX_HEADER_BYTES, 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.count += len(data)
        if self.count > self.limit:
            raise DataError(f"{self._name} unpacks to more than {self.limit:,} bytes where CIFAR-10 has less.")
        return data
