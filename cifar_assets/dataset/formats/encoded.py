"""Rows of picture files with labels: Parquet in the Hugging Face layout, and tars of picture files.

Parquet has a struct column `img` (or `image`) of bytes and path, and `label`. A tar has members `[split/]class/name`,
uncompressed and as they were; its bytes depend on nothing but its members' names and contents, so equal pictures give
an equal object wherever and whenever they are packed.
"""

import io
import json
import math
import tarfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cifar_assets.contracts import CLASSES, IMAGE_SHAPE
from cifar_assets.cpus import available_cpus
from cifar_assets.dataset.formats.images import DEFAULT_LIMITS, ImageError, prepare_image
from cifar_assets.dataset.formats.names import class_of
from cifar_assets.dataset.formats.rows import BATCH_ROWS, REFUSED_LABEL, RowBatch, Split, label_refusal
from resources.errors import DataError

_EncodedRow = tuple[bytes | str, int]
"""A picture file, or the reason why there is none that can be used; and its label."""

_CHUNK_ROWS = 64
"""Rows that a thread decodes at a time: a hand-over costs as much as a small picture."""
_BATCH_BYTES = 64 << 20
"""Encoded images held at a time; of CIFAR-10's own, a batch has 5 MB."""
_PARQUET_ROWS = 16
"""Rows in memory at a time: a row may be a picture of several megabytes, however small the file is."""

_BINARY = ([pa.binary()], [pa.large_binary()], [pa.binary_view()])


def read_parquet(path: Path, split: Split, name: str, *, resize: bool) -> Iterator[RowBatch]:
    """Decoded rows, in file order. Raises DataError naming the file when it is cut off or has other columns."""
    try:
        with pq.ParquetFile(path) as file:
            column = _check_schema(file.schema_arrow, name)
            yield from _decode(_parquet_rows(file, column), split, resize)
    except MemoryError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last for names of columns
        raise DataError(
            f"{name} is not a readable Parquet file ({path.stat().st_size:,} bytes): {error}. "
            "It is cut off, still being written, or another format: fetch or upload it again."
        ) from error


def read_image_tar(path: Path, split: Split, name: str, *, resize: bool) -> Iterator[RowBatch]:
    """Decoded rows in member order."""
    return _decode(_tar_rows(path, name), split, resize)


def pack_images(target: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write a tar of the members (name `class/...`, bytes of the file) in the order given."""
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def _decode(rows: Iterable[_EncodedRow], split: Split, resize: bool) -> Iterator[RowBatch]:
    """Batches of decoded rows in the order given. A row that does not decode is refused, not raised."""

    def prepare(chunk: list[_EncodedRow]) -> list[NDArray[np.uint8] | str]:
        return [_prepare(row, resize) for row in chunk]

    first_row = 0
    with ThreadPoolExecutor(min(4, math.ceil(available_cpus())), thread_name_prefix="decode") as pool:
        for batch in _in_batches(rows):
            images = np.zeros((len(batch), *IMAGE_SHAPE), np.uint8)
            labels = np.full(len(batch), REFUSED_LABEL)
            refused = {}
            chunks = (batch[start : start + _CHUNK_ROWS] for start in range(0, len(batch), _CHUNK_ROWS))
            for position, image in enumerate(chain.from_iterable(pool.map(prepare, chunks))):
                if isinstance(image, str):
                    refused[first_row + position] = image
                else:
                    images[position], labels[position] = image, batch[position][1]
            yield RowBatch(first_row, split, images, labels, refused)
            first_row += len(batch)


def _prepare(row: _EncodedRow, resize: bool) -> NDArray[np.uint8] | str:
    try:
        return row[0] if isinstance(row[0], str) else prepare_image(row[0], resize=resize)
    except ImageError as error:
        return str(error)


def _in_batches(rows: Iterable[_EncodedRow]) -> Iterator[list[_EncodedRow]]:
    batch: list[_EncodedRow] = []
    num_bytes = 0
    for row in rows:
        batch.append(row)
        num_bytes += len(row[0])
        if len(batch) == BATCH_ROWS or num_bytes >= _BATCH_BYTES:
            yield batch
            batch, num_bytes = [], 0
    if batch:
        yield batch


def _check_schema(schema: pa.Schema, name: str) -> str:
    """The name of the image column. DataError when the columns are not those of the layout."""
    column = next((candidate for candidate in ("img", "image") if candidate in schema.names), None)
    if column is None or schema.names.count(column) != 1 or schema.names.count("label") != 1:
        raise DataError(
            f"{name}: expected one column img (struct of bytes, path) and one label, got {', '.join(schema.names)}."
        )
    kind = schema.field(column).type
    if not pa.types.is_struct(kind) or [field.type for field in kind if field.name == "bytes"] not in _BINARY:
        raise DataError(f"{name}: column {column} is {kind}; expected struct<bytes: binary, path: string>.")
    if not pa.types.is_integer(schema.field("label").type):
        raise DataError(f"{name}: column label is {schema.field('label').type}; expected an integer 0 to 9.")
    try:  # what the `datasets` library keeps in a file that it wrote
        features: Any = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        classes = tuple(features["label"]["names"])
    except (KeyError, ValueError, TypeError):
        return column
    if classes != CLASSES:
        raise DataError(f"{name}: declares the classes {classes}; expected {CLASSES}. Labels would mean other classes.")
    return column


def _parquet_rows(file: pq.ParquetFile, column: str) -> Iterator[_EncodedRow]:
    for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[f"{column}.bytes", "label"]):
        images = batch.column(column)
        for struct, value, label in zip(images, images.field("bytes"), batch.column("label").to_pylist(), strict=True):
            data, refusal = value.as_buffer() if struct.is_valid else None, label_refusal(label)
            if data is not None and data.size > DEFAULT_LIMITS.max_bytes:
                refusal = f"the image has {data.size:,} bytes: at most {DEFAULT_LIMITS.max_bytes:,} are read"
            if refusal is None and data is not None:
                yield data.to_pybytes(), label
            else:
                yield refusal or "the image is missing", REFUSED_LABEL


def _tar_rows(path: Path, name: str) -> Iterator[_EncodedRow]:
    try:
        with tarfile.open(path, "r|") as archive:
            for member in archive:
                file, label = archive.extractfile(member), class_of(member.name)
                if file is None or label is None:
                    raise DataError(f"{name}: member {member.name!r} is not an image in a class folder.")
                yield file.read(), label
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{name} is cut off or damaged: {error}.") from error
