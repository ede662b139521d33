"""Parquet in the Hugging Face image layout: a struct column `img` (or `image`) of bytes and path, and `label`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cifar_assets.contracts import CLASSES
from cifar_assets.dataset.formats.decoding import decode_rows
from cifar_assets.dataset.formats.images import DEFAULT_LIMITS
from cifar_assets.dataset.formats.rows import EncodedRow, RowBatch, Split, label_refusal
from resources.errors import DataError

_BATCH_ROWS = 16
"""Rows in memory at a time: a row may be a picture of several megabytes, however small the file is."""

_IMAGE_COLUMNS = ("img", "image")
_BINARY = ([pa.binary()], [pa.large_binary()], [pa.binary_view()])


def read_parquet(path: Path, split: Split, name: str, *, resize: bool) -> Iterator[RowBatch]:
    """Decoded rows, in file order. Raises DataError naming the file when it is cut off or has other columns."""
    try:
        with pq.ParquetFile(path) as file:
            column = _check_schema(file.schema_arrow, name)
            yield from decode_rows(_encoded_rows(file, column), split, resize=resize)
    except MemoryError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last for names of columns
        raise DataError(
            f"{name} is not a readable Parquet file ({path.stat().st_size:,} bytes): {error}. "
            "It is cut off, still being written, or another format: fetch or upload it again."
        ) from error


def pick_rows(path: Path, rows: dict[int, str], target: Path) -> None:
    """Write the given rows, each with its row number and reason, to another Parquet file."""
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow.append(pa.field("row", pa.int64())).append(pa.field("reason", pa.string()))
        with pq.ParquetWriter(target, schema) as writer:
            first = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                numbers = [row for row in range(first, first + batch.num_rows) if row in rows]
                picked = batch.take(pa.array([row - first for row in numbers], pa.int64()))
                reasons = [pa.array(numbers, pa.int64()), pa.array([rows[row] for row in numbers], pa.string())]
                writer.write_batch(pa.RecordBatch.from_arrays([*picked.columns, *reasons], schema=schema))
                first += batch.num_rows


def _check_schema(schema: pa.Schema, name: str) -> str:
    column = next((candidate for candidate in _IMAGE_COLUMNS if candidate in schema.names), None)
    if column is None or schema.names.count(column) != 1 or schema.names.count("label") != 1:
        raise DataError(
            f"{name}: expected one column img (struct of bytes, path) and one label, got {', '.join(schema.names)}."
        )
    kind = schema.field(column).type
    if not pa.types.is_struct(kind) or [field.type for field in kind if field.name == "bytes"] not in _BINARY:
        raise DataError(f"{name}: column {column} is {kind}; expected struct<bytes: binary, path: string>.")
    if not pa.types.is_integer(schema.field("label").type):
        raise DataError(f"{name}: column label is {schema.field('label').type}; expected an integer 0 to 9.")
    names = _declared_classes(schema)
    if names is not None and tuple(names) != CLASSES:
        raise DataError(
            f"{name}: declares the classes {names}; expected {list(CLASSES)}. Labels would mean other classes."
        )
    return column


def _declared_classes(schema: pa.Schema) -> list[str] | None:
    """Class names that the `datasets` library keeps in the schema's metadata, where it wrote the file."""
    try:
        features: Any = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return list(features["label"]["names"])
    except (KeyError, ValueError, TypeError):
        return None


def _encoded_rows(file: pq.ParquetFile, column: str) -> Iterator[EncodedRow]:
    for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[f"{column}.bytes", "label"]):
        images = batch.column(column)
        for struct, value, label in zip(images, images.field("bytes"), batch.column("label").to_pylist(), strict=True):
            data, refusal = value.as_buffer() if struct.is_valid else None, label_refusal(label)
            if data is not None and data.size > DEFAULT_LIMITS.max_bytes:
                data, refusal = (
                    None,
                    f"the image has {data.size:,} bytes: at most {DEFAULT_LIMITS.max_bytes:,} are read",
                )
            yield EncodedRow(None if data is None else data.to_pybytes(), -1 if refusal else label, refusal)
