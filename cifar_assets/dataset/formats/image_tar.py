"""Single image files packed into one object: an uncompressed tar of `[split/]class/name`, the files as they were.

The tar's bytes depend on nothing but its members' names and contents, so equal pictures give an equal object wherever
and whenever they are packed.
"""

import io
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from cifar_assets.contracts import CLASSES
from cifar_assets.dataset.formats.decoding import decode_rows
from cifar_assets.dataset.formats.rows import EncodedRow, RowBatch, Split
from resources.errors import DataError


def pack_images(target: Path, members: Iterable[tuple[str, bytes]]) -> None:
    """Write the members (name `class/...`, image file bytes) in the order given."""
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def read_image_tar(path: Path, split: Split, name: str, *, resize: bool) -> Iterator[RowBatch]:
    """Decoded rows in member order."""
    yield from decode_rows(_encoded_rows(path, name), split, resize=resize)


def member_names(path: Path) -> list[str]:
    """The members' names, by row number."""
    with tarfile.open(path, "r:") as archive:
        return archive.getnames()


def class_of(key: str) -> int | None:
    """The label that the nearest folder named like a class gives a key, or None."""
    for part in reversed(key.split("/")[:-1]):
        if part.lower() in CLASSES:
            return CLASSES.index(part.lower())
    return None


def _encoded_rows(path: Path, name: str) -> Iterator[EncodedRow]:
    try:
        with tarfile.open(path, "r|") as archive:
            for member in archive:
                file = archive.extractfile(member)
                label = class_of(member.name)
                if file is None or label is None:
                    raise DataError(f"{name}: member {member.name!r} is not an image in a class folder.")
                yield EncodedRow(file.read(), label)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(f"{name} is cut off or damaged: {error}.") from error
