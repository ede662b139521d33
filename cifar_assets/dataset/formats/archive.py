"""The official CIFAR-10 archives, python and binary. Members are read in place and never unpacked to disk.

A binary record is one label byte, then 3072 bytes of one image: red, green and blue planes, row by row. The cost of
reading an archive is limited by the process that reads it, and by a maximum member size because not every system limits
memory.
"""

import gzip
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Self, cast

import numpy as np
from numpy.typing import NDArray

from cifar_assets.contracts import CLASSES, IMAGE_SHAPE
from cifar_assets.dataset.formats.pickles import load_fields
from cifar_assets.dataset.formats.rows import RowBatch, pixel_batches
from resources.errors import DataError

PYTHON_FOLDER = "cifar-10-batches-py"
BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")

_MAX_MEMBER_BYTES = 64 << 20
"""Limit for one batch; an official one has 31 MB."""
_MAX_HEADER_BYTES = 1 << 20
"""Limit for the headers that tarfile reads before a member, such as a long name."""
_HEADER_TYPES = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_META = ("batches.meta", "batches.meta.txt")
_MAX_UNREAD = 1000
_IMAGE_BYTES = int(np.prod(IMAGE_SHAPE))
_READ_ERRORS = (EOFError, OSError, RecursionError, ValueError, tarfile.TarError, zlib.error)

_Rows = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images (N x 3 x 32 x 32) and their labels."""


class _Header(tarfile.TarInfo):
    """Refuses a header of another member by the size that it claims, before tarfile reads it into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.type in _HEADER_TYPES and header.size > _MAX_HEADER_BYTES:
            raise tarfile.TarError(f"a header claims {header.size:,} bytes; at most {_MAX_HEADER_BYTES:,} are read")
        return header


def read_archive(path: Path, name: str, unread: dict[str, str] | None = None) -> Iterator[RowBatch]:
    """Rows of a `.tar`, `.tar.gz` or `.tgz` in the official layout, in the order of its members.

    `name` is the archive's name in errors; `unread` receives the members that are skipped, with the reason. DataError
    for a member that points outside the folder, is not a regular file or tries to run code, and for other faults.
    """
    first_row, seen = 0, set[str]()
    try:
        with _unpacked(path) as stream, tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header) as archive:
            for member in archive:
                where = f"{name}, member {member.name!r}"
                base, content = _checked_name(member, where), archive.extractfile(member)
                stem = base.removesuffix(".bin")
                if content and stem in BATCHES:
                    if stem in seen:
                        raise DataError(f"{name} has {stem} twice. Remove one of them.")
                    seen.add(stem)
                    read = parse_records if base.endswith(".bin") else _parse_pickle
                    images, labels = read(content.read(), where)
                    if not len(images):
                        raise DataError(f"{where} has no images. Download or upload the archive again.")
                    yield from pixel_batches(images, labels, "test" if stem == BATCHES[-1] else "train", first_row)
                    first_row += len(labels)
                elif content and base in _META:
                    _check_meta(base, content.read(), where)
                elif content and unread is not None and len(unread) < _MAX_UNREAD:
                    unread[member.name] = "not a batch"
            # tarfile stops at its end mark; gzip checks length and checksum at its own.
            while stream.read(1 << 20):
                pass
    except _READ_ERRORS as error:
        raise DataError(
            f"{name} ({path.stat().st_size:,} bytes) is not a readable tar archive, after the batches "
            f"{', '.join(sorted(seen)) or 'none'}: {error}. It is truncated, or is another file such as an error "
            "page: download or upload it again."
        ) from error
    missing = [batch for batch in BATCHES if batch not in seen]
    if missing:
        raise DataError(
            f"{name} does not have the official CIFAR-10 layout or is truncated: expected {len(BATCHES)} batches, "
            f"got {len(seen)}; missing {', '.join(missing)}."
        )


def parse_records(data: bytes, where: str) -> _Rows:
    """Images and labels of binary records. DataError when the data ends within a record."""
    if len(data) % (1 + _IMAGE_BYTES):
        raise DataError(f"{where} is truncated: {len(data):,} bytes are not whole records of {1 + _IMAGE_BYTES} bytes.")
    records = np.frombuffer(data, dtype=np.uint8).reshape(-1, 1 + _IMAGE_BYTES)
    return records[:, 1:].reshape(-1, *IMAGE_SHAPE), records[:, 0].astype(np.int64)


def pack_records(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> bytes:
    """The inverse of `parse_records`."""
    return np.concatenate([labels.astype(np.uint8)[:, None], images.reshape(len(images), -1)], axis=1).tobytes()


def _unpacked(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(path)) if is_gzip else path.open("rb")


def _checked_name(member: tarfile.TarInfo, where: str) -> str:
    """The last part of a file's name. Refuses what could trick an unpacking tool or its memory, and unknown batches."""
    parts = member.name.replace("\\", "/").split("/")
    is_plain = (member.isreg() and not member.issparse()) or member.isdir()
    if not parts[0] or ".." in parts or ":" in parts[0] or not is_plain:
        raise DataError(
            f"{where} points outside the archive's folder, or is a link or special file. Nothing was unpacked. Do "
            "not use the archive; download it from its source again."
        )
    base = parts[-1]
    is_wanted = base.removesuffix(".bin") in BATCHES or base in _META
    if member.isreg() and not is_wanted and base.startswith(("data_batch", "test_batch")):
        raise DataError(f"{where} is not a batch of the official archive, {', '.join(BATCHES)}. Remove or rename it.")
    if is_wanted and member.size > _MAX_MEMBER_BYTES:
        raise DataError(f"{where} declares {member.size:,} bytes; at most {_MAX_MEMBER_BYTES:,} are read.")
    return base


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
    """A short description of a value, which may be of any size."""
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"


def _check_meta(base: str, data: bytes, where: str) -> None:
    names = (
        data.decode("ascii", "replace").split()
        if base.endswith(".txt")
        else load_fields(data, where).get("label_names")
    )
    expected = [name.encode() for name in CLASSES], list(CLASSES)
    if names not in expected:
        raise DataError(f"{where}: the label names are not {', '.join(CLASSES)}. Labels would mean other classes.")
