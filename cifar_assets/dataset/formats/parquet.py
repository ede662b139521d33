"""Parquet in the Hugging Face layout: a struct column `img` (or `image`) of bytes and path, and `label`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cifar_assets.contracts import CLASSES
from cifar_assets.dataset.formats.encoded import EncodedRow
from resources.errors import DataError

_PARQUET_ROWS = 16
"""Rows in memory at a time: a row may decode to several megabytes even if the file is small."""

_BINARY = ([pa.binary()], [pa.large_binary()], [pa.binary_view()])


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


def parquet_rows(path: Path, name: str) -> Iterator[EncodedRow]:
    """The rows in file order. DataError for other columns, OSError for a file that cannot be read."""
    try:
        yield from _rows(path, name)
    except MemoryError:  # may be an ArrowException too
        raise
    except pa.ArrowException as error:
        raise OSError(str(error)) from error


def _rows(path: Path, name: str) -> Iterator[EncodedRow]:
    with pq.ParquetFile(path) as file:
        column = _check_schema(file.schema_arrow, name)
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[f"{column}.bytes", "label"]):
            (images,) = batch.column(column).flatten()
            for image, label in zip(images, batch.column("label"), strict=True):
                yield image.as_py() or b"", label.as_py()  # one value in memory at a time
