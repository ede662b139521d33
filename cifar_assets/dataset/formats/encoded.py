"""Rows of labeled picture files: Parquet, and tar files of pictures.

A tar has members `[split/]class/name`, uncompressed and as they were; its bytes depend on nothing but its members'
names and contents, so equal pictures give an equal object wherever and whenever they are packed.
"""

import io
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

from cifar_assets.dataset.formats.images import SOURCE_LIMITS, prepare_image
from cifar_assets.dataset.formats.names import class_of
from cifar_assets.dataset.formats.rows import Preparation, RowBatch, Split, row_batches
from cifar_assets.dataset.formats.survey import Survey
from resources.errors import DataError

EncodedRow = tuple[bytes, object]
"""A picture file and its label, both unchecked."""

_SURVEYED = 20_000


def read_encoded(path: Path, kind: str, split: Split, name: str, how: Preparation) -> Iterator[RowBatch]:
    """Decoded rows of a file with pictures, in file order. DataError naming the file when it has another format."""
    pixels_of = partial(prepare_image, size=how.image_size, fit=how.fit, resize=how.resize, limits=SOURCE_LIMITS)
    with _naming_the_file(path, kind, name):
        yield from row_batches(_KINDS[kind][1](path, name, how.classes), pixels_of, split, how)


def survey_encoded(path: Path, kind: str, name: str) -> Survey:
    """What a file with pictures says of itself, from the headers of its first pictures. Raises as `read_encoded`."""
    found = Survey()
    with _naming_the_file(path, kind, name):
        if kind == "parquet":
            # loading pyarrow takes a noticeable part of the time to load the code location
            from cifar_assets.dataset.formats.parquet import survey_labels

            found.classes, found.highest_label = survey_labels(path, name)
        for data, _ in islice(_KINDS[kind][1](path, name, None), _SURVEYED):
            found.add(data)
    return found


@contextmanager
def _naming_the_file(path: Path, kind: str, name: str) -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except (tarfile.TarError, EOFError, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{name} is not a readable {_KINDS[kind][0]} ({path.stat().st_size:,} bytes): {error}. "
            "It is truncated, still being written, or in another format: download or upload it again."
        ) from error


def pack_images(target: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write a tar file of the members (name `class/...`, file content) in the order given."""
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def _parquet_rows(path: Path, name: str, classes: tuple[str, ...] | None) -> Iterator[EncodedRow]:
    from cifar_assets.dataset.formats.parquet import parquet_rows

    return parquet_rows(path, name, classes)


def _tar_rows(path: Path, name: str, classes: tuple[str, ...] | None) -> Iterator[EncodedRow]:
    with tarfile.open(path, "r|") as archive:
        for member in archive:
            file, label = archive.extractfile(member), class_of(member.name, classes or ())
            if file is None or (label is None and classes is not None):
                raise DataError(f"{name}: member {member.name!r} is not an image in a class folder.")
            yield file.read(), label


def _picture_rows(path: Path, name: str, classes: tuple[str, ...] | None) -> Iterator[EncodedRow]:
    yield path.read_bytes(), class_of(name, classes or ())


_KINDS = {
    "parquet": ("Parquet file", _parquet_rows),
    "images": ("tar archive", _tar_rows),
    "picture": ("file", _picture_rows),
}
