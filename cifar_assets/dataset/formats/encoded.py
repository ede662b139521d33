"""Rows of labeled picture files: Parquet, and tar files of pictures.

A tar has members `[split/]class/name`, uncompressed and as they were; its bytes depend on nothing but its members'
names and contents, so equal pictures give an equal object wherever and whenever they are packed.
"""

import io
import tarfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from cifar_assets.dataset.formats.images import prepare_image
from cifar_assets.dataset.formats.names import class_of
from cifar_assets.dataset.formats.rows import RowBatch, Split, row_batches
from resources.errors import DataError

EncodedRow = tuple[bytes, object]
"""A picture file and its label, both unchecked."""


def read_encoded(path: Path, kind: str, split: Split, name: str, *, resize: bool) -> Iterator[RowBatch]:
    """Decoded rows of a file with pictures, in file order. DataError naming the file when it has another format."""
    noun, rows = _KINDS[kind]
    try:
        yield from row_batches(rows(path, name), partial(prepare_image, resize=resize), split)
    except MemoryError:
        raise
    except (tarfile.TarError, EOFError, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{name} is not a readable {noun} ({path.stat().st_size:,} bytes): {error}. "
            "It is truncated, still being written, or in another format: download or upload it again."
        ) from error


def pack_images(target: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write a tar file of the members (name `class/...`, file content) in the order given."""
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def _parquet_rows(path: Path, name: str) -> Iterator[EncodedRow]:
    # loading pyarrow takes a noticeable part of the time to load the code location
    from cifar_assets.dataset.formats.parquet import parquet_rows

    return parquet_rows(path, name)


def _tar_rows(path: Path, name: str) -> Iterator[EncodedRow]:
    with tarfile.open(path, "r|") as archive:
        for member in archive:
            file, label = archive.extractfile(member), class_of(member.name)
            if file is None or label is None:
                raise DataError(f"{name}: member {member.name!r} is not an image in a class folder.")
            yield file.read(), label


def _picture_rows(path: Path, name: str) -> Iterator[EncodedRow]:
    yield path.read_bytes(), class_of(name)


_KINDS = {
    "parquet": ("Parquet file", _parquet_rows),
    "images": ("tar archive", _tar_rows),
    "picture": ("file", _picture_rows),
}
