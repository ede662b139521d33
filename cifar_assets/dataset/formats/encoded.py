"""Rows of labeled picture files: Parquet in the Hugging Face layout, and tar files of pictures.

Parquet has a struct column `img` (or `image`) of bytes and path, and `label`. A tar has members `[split/]class/name`,
uncompressed and as they were; its bytes depend on nothing but its members' names and contents, so equal pictures give
an equal object wherever and whenever they are packed.
"""

import io
import json
import tarfile
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cifar_assets.contracts import CLASSES
from cifar_assets.dataset.formats.images import prepare_image
from cifar_assets.dataset.formats.names import class_of
from cifar_assets.dataset.formats.rows import RowBatch, Split, row_batches
from resources.errors import DataError

_PARQUET_ROWS = 16
"""Rows in memory at a time: a row may decode to several megabytes even if the file is small."""

_Row = tuple[bytes, object]
"""A picture file and its label, both unchecked."""

_BINARY = ([pa.binary()], [pa.large_binary()], [pa.binary_view()])


def read_encoded(path: Path, kind: str, split: Split, name: str, *, resize: bool) -> Iterator[RowBatch]:
    """Decoded rows of a file with pictures, in file order. DataError naming the file when it has another format."""
    noun, rows = _KINDS[kind]
    try:
        yield from row_batches(rows(path, name), partial(prepare_image, resize=resize), split)
    except MemoryError:
        raise
    except (pa.ArrowException, tarfile.TarError, EOFError, OSError, UnicodeDecodeError) as error:
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


def _check_schema(schema: pa.Schema, name: str) -> str:
    """The name of the image column. DataError when the columns do not match the layout."""
    column = "img" if "img" in schema.names else "image"
    if schema.names.count(column) != 1 or schema.names.count("label") != 1:
        raise DataError(
            f"{name}: expected one column img (struct of bytes, path) and one label, got {', '.join(schema.names)}."
        )
    image, label = schema.field(column).type, schema.field("label").type
    is_struct = pa.types.is_struct(image) and [field.type for field in image if field.name == "bytes"] in _BINARY
    if not is_struct or not pa.types.is_integer(label):
        raise DataError(
            f"{name}: expected {column} as struct<bytes: binary, path: string> and an integer label, got {image} and "
            f"{label}."
        )
    try:  # metadata that the `datasets` library writes
        features: Any = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        classes = tuple(features["label"]["names"])
    except (KeyError, ValueError, TypeError):
        return column
    if classes != CLASSES:
        raise DataError(
            f"{name}: the file declares the classes {classes}; expected {CLASSES}. Labels would mean other classes."
        )
    return column


def _parquet_rows(path: Path, name: str) -> Iterator[_Row]:
    with pq.ParquetFile(path) as file:
        column = _check_schema(file.schema_arrow, name)
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[f"{column}.bytes", "label"]):
            for image, label in zip(batch.column(column), batch.column("label"), strict=True):
                yield (image.as_py() or {}).get("bytes") or b"", label.as_py()


def _tar_rows(path: Path, name: str) -> Iterator[_Row]:
    with tarfile.open(path, "r|") as archive:
        for member in archive:
            file, label = archive.extractfile(member), class_of(member.name)
            if file is None or label is None:
                raise DataError(f"{name}: member {member.name!r} is not an image in a class folder.")
            yield file.read(), label


def _picture_rows(path: Path, name: str) -> Iterator[_Row]:
    yield path.read_bytes(), class_of(name)


_KINDS = {
    "parquet": ("Parquet file", _parquet_rows),
    "images": ("tar archive", _tar_rows),
    "picture": ("file", _picture_rows),
}
