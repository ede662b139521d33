"""The official archives: CIFAR-10, python and binary, and CIFAR-100, python, with its fine labels.

Members are read in place and never unpacked to disk. A binary record is one label byte, then 3072 bytes of one image:
red, green and blue planes, row by row. The cost of
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

from cifar_assets.contracts import CLASSES
from cifar_assets.dataset.formats.images import ImageError, scaled_pixels
from cifar_assets.dataset.formats.pickles import load_fields
from cifar_assets.dataset.formats.rows import Preparation, RowBatch, Split, row_batches
from cifar_assets.dataset.formats.survey import Survey, check_classes
from resources.errors import DataError

PYTHON_FOLDER = "cifar-10-batches-py"
BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
_BATCHES_100 = ("train", "test")
_BINARY_100 = ("train.bin", "test.bin")
_LAYOUTS = (BATCHES, _BATCHES_100)
SIDE = 32
"""Height and width of the images in pixels."""

_MAX_MEMBER_BYTES, _MAX_MEMBER_BYTES_100 = 64 << 20, 256 << 20
"""Limits for one batch; an official one has 31 MB, or 155 MB of CIFAR-100."""
_MAX_HEADER_BYTES = 1 << 20
"""Limit for the headers that tarfile reads before a member, such as a long name."""
_HEADER_TYPES = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_META = ("batches.meta", "batches.meta.txt", "meta")
_MAX_UNREAD = 1000
_IMAGE_SHAPE = (3, SIDE, SIDE)
_IMAGE_BYTES = int(np.prod(_IMAGE_SHAPE))
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


def read_archive(path: Path, name: str, how: Preparation, unread: dict[str, str] | None = None) -> Iterator[RowBatch]:
    """Rows of a `.tar`, `.tar.gz` or `.tgz` in an official layout, in the order of its members.

    `name` is the archive's name in errors; `unread` receives the members that are skipped, with the reason. DataError
    for a member that points outside the folder, is not a regular file or tries to run code, for other classes, and for
    other faults.
    """
    first_row, seen, is_named = 0, set[str](), False
    for member, base, data in _members(path, name, seen):
        where, stem = f"{name}, member {member!r}", base.removesuffix(".bin")
        if _is_batch(base):
            if stem in seen:
                raise DataError(f"{name} has {stem} twice. Remove one of them.")
            seen.add(stem)
            read = parse_records if base.endswith(".bin") else _parse_pickle
            images, labels = read(data, where)
            if not len(images):
                raise DataError(f"{where} has no images. Download or upload the archive again.")
            yield from pixel_batches(
                images, labels, "test" if stem in ("test_batch", "test") else "train", how, first_row
            )
            first_row += len(labels)
        elif base in _META:
            check_classes(how.classes, _label_names(base, data, where), where)
            is_named = True
        elif unread is not None and len(unread) < _MAX_UNREAD:
            unread[member] = "not a batch"
    expected = _BATCHES_100 if seen & set(_BATCHES_100) else BATCHES
    missing = [batch for batch in expected if batch not in seen]
    if expected is _BATCHES_100 and not is_named:
        raise DataError(f"{name} does not name its classes: it has no member 'meta'. Download or upload it again.")
    if missing or len(seen) > len(expected):
        raise DataError(
            f"{name} does not have an official CIFAR layout or is truncated: expected {len(expected)} batches, "
            f"got {len(seen)}; missing {', '.join(missing) or 'none'}."
        )


def survey_archive(path: Path, name: str) -> Survey:
    """What the archive says of itself. Raises as `read_archive`."""
    found = Survey(smallest=(SIDE, SIDE), largest=(SIDE, SIDE))
    for member, base, data in _members(path, name, set()):
        where = f"{name}, member {member!r}"
        if base in _META:
            found.classes = _label_names(base, data, where)
            return found
    found.highest_label = len(CLASSES) - 1  # CIFAR-10: reading an archive of CIFAR-100 without names is an error
    return found


def _members(path: Path, name: str, seen: set[str]) -> Iterator[tuple[str, str, bytes]]:
    """Name, last part of the name, and content of each file; the content of others than batches and names is empty."""
    try:
        with _unpacked(path) as stream, tarfile.open(fileobj=stream, mode="r|", tarinfo=_Header) as archive:
            for member in archive:
                base, content = _checked_name(member, f"{name}, member {member.name!r}"), archive.extractfile(member)
                if content:
                    yield member.name, base, content.read() if _is_batch(base) or base in _META else b""
            # tarfile stops at its end mark; gzip checks length and checksum at its own.
            while stream.read(1 << 20):
                pass
    except _READ_ERRORS as error:
        raise DataError(
            f"{name} ({path.stat().st_size:,} bytes) is not a readable tar archive, after the batches "
            f"{', '.join(sorted(seen)) or 'none'}: {error}. It is truncated, or is another file such as an error "
            "page: download or upload it again."
        ) from error


def _is_batch(base: str) -> bool:
    return any(base.removesuffix(".bin") in layout for layout in _LAYOUTS)


def pixel_batches(
    images: NDArray[np.uint8], labels: NDArray[np.int64], split: Split, how: Preparation, first_row: int = 0
) -> Iterator[RowBatch]:
    """Batches over decoded pixels (N x 3 x 32 x 32) and their labels."""

    def pixels_of(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if how.image_size == SIDE:
            return pixels
        if not how.resize:
            raise ImageError(f"a {how.image_size}x{how.image_size} image", f"{SIDE}x{SIDE} pixels")
        return scaled_pixels(pixels, how.image_size)

    yield from row_batches(zip(images, labels, strict=True), pixels_of, split, how, first_row)


def parse_records(data: bytes, where: str) -> _Rows:
    """Images and labels of binary records. DataError when the data ends within a record."""
    if len(data) % (1 + _IMAGE_BYTES):
        raise DataError(f"{where} is truncated: {len(data):,} bytes are not whole records of {1 + _IMAGE_BYTES} bytes.")
    records = np.frombuffer(data, dtype=np.uint8).reshape(-1, 1 + _IMAGE_BYTES)
    return records[:, 1:].reshape(-1, *_IMAGE_SHAPE), records[:, 0].astype(np.int64)


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
    if base in _BINARY_100:
        raise DataError(f"{where} is of CIFAR-100's binary archive. Use its Python archive, cifar-100-python.tar.gz.")
    is_wanted = _is_batch(base) or base in _META
    if member.isreg() and not is_wanted and base.startswith(("data_batch", "test_batch")):
        raise DataError(f"{where} is not a batch of the official archive, {', '.join(BATCHES)}. Remove or rename it.")
    limit = _MAX_MEMBER_BYTES_100 if base in _BATCHES_100 else _MAX_MEMBER_BYTES
    if is_wanted and member.size > limit:
        raise DataError(f"{where} declares {member.size:,} bytes; at most {limit:,} are read.")
    return base


def _parse_pickle(data: bytes, where: str) -> _Rows:
    fields = load_fields(data, where)
    pixels, labels = fields.get("data"), fields.get("fine_labels", fields.get("labels"))
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (_IMAGE_BYTES,):
        raise DataError(f"{where}: expected data as a uint8 array N x {_IMAGE_BYTES}, got {_kind(pixels)}.")
    if isinstance(labels, list) and all(type(label) is int for label in labels):
        labels = np.asarray(labels, None if labels else np.int64)
    if not isinstance(labels, np.ndarray) or labels.shape != (len(pixels),) or labels.dtype.kind not in "iu":
        raise DataError(f"{where}: expected {len(pixels)} integer labels, got {_kind(labels)}.")
    return pixels.reshape(-1, *_IMAGE_SHAPE), labels.astype(np.int64)


def _kind(value: object) -> str:
    """A short description of a value, which may be of any size."""
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"


def _label_names(base: str, data: bytes, where: str) -> tuple[str, ...]:
    if base.endswith(".txt"):
        names: object = data.decode("ascii", "replace").split()
    else:
        fields = load_fields(data, where)
        names = fields.get("fine_label_names", fields.get("label_names"))
    if not isinstance(names, list) or not all(isinstance(name, str | bytes) for name in names):
        raise DataError(f"{where}: expected a list of class names, got {_kind(names)}.")
    return tuple(name.decode("latin1") if isinstance(name, bytes) else name for name in names)
