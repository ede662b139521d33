"""Parquet in the Hugging Face layout: a column of pictures (a struct with `bytes`) and one of integer labels."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cifar_assets.dataset.formats.encoded import EncodedRow
from cifar_assets.dataset.formats.survey import check_classes
from resources.errors import DataError

_PARQUET_ROWS = 16
"""Rows in memory at a time: a row may decode to several megabytes even if the file is small."""

_BINARY = ([pa.binary()], [pa.large_binary()], [pa.binary_view()])
_IMAGES = ("img", "image")
_LABELS = ("label", "labels", "fine_label")
"""Names that decide which column is read when several could be."""


def parquet_rows(path: Path, name: str, classes: tuple[str, ...] | None) -> Iterator[EncodedRow]:
    """The rows in file order. DataError for other columns or classes, OSError for a file that cannot be read."""
    with _opened(path) as file:
        image, label = _columns(file.schema_arrow, name)
        if classes is not None:
            check_classes(classes, _names(file.schema_arrow, label) or classes, name)
        for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[f"{image}.bytes", label]):
            (images,) = batch.column(image).flatten()
            for data, number in zip(images, batch.column(label), strict=True):
                yield data.as_py() or b"", number.as_py()  # one value in memory at a time


def survey_labels(path: Path, name: str) -> tuple[tuple[str, ...] | None, int]:
    """The class names in the metadata that the `datasets` library writes; without them, the highest label or -1."""
    with _opened(path) as file:
        label = _columns(file.schema_arrow, name)[1]
        if names := _names(file.schema_arrow, label):
            return names, -1
        columns = (batch.column(0).drop_null() for batch in file.iter_batches(columns=[label]))
        return None, max((int(column.to_numpy().max()) for column in columns if len(column)), default=-1)


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except MemoryError:  # may be an ArrowException too
        raise
    except pa.ArrowException as error:
        raise OSError(str(error)) from error


def _columns(schema: pa.Schema, name: str) -> tuple[str, str]:
    """The names of the image and the label column. DataError when it is not clear which they are."""
    pictures = [field.name for field in schema if _holds_pictures(field.type)]
    numbers = [field.name for field in schema if pa.types.is_integer(field.type)]
    declared = [label for label in numbers if _names(schema, label)]
    image, label = _choose(pictures, _IMAGES), _choose(numbers, _LABELS) or _choose(declared, ())
    if image is None or label is None:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise DataError(
            f"{name}: expected one column of pictures, struct<bytes: binary, path: string>, and one of integer labels; "
            f"got {columns}. If there are several, call the one to read image or label."
        )
    return image, label


def _choose(names: list[str], usual: tuple[str, ...]) -> str | None:
    chosen = next((name for name in usual if name in names), names[0] if len(names) == 1 else None)
    return chosen if chosen is None or names.count(chosen) == 1 else None


def _holds_pictures(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and [field.type for field in kind if field.name == "bytes"] in _BINARY


def _names(schema: pa.Schema, label: str) -> tuple[str, ...] | None:
    try:
        features: Any = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
        return tuple(names) if names and all(type(name) is str for name in names) else None
    except (KeyError, ValueError, TypeError):
        return None
