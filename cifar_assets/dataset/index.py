"""The index of an object: pixel digest, label, split and refusal of each row, known without reading it again.

An index is a function of the object's bytes, of the classes and of how images are prepared. Its key covers them all, so
it never becomes stale. It makes validating an unchanged object cheap. It is derived data: deleting it only costs time.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.numpy import load, save

from cifar_assets.dataset.formats.isolated import ask
from cifar_assets.dataset.formats.rows import REFUSED_LABEL, SPLITS, Preparation, RowBatch
from cifar_assets.dataset.formats.survey import Survey
from cifar_assets.dataset.objects import ObjectFormat, RawObject, fetched, read_state
from resources.errors import DataError, ObjectNotFoundError
from resources.object_store import ObjectStore

INDEX_PREFIX = "index/"
MAX_REFUSED_ROWS = 100_000
"""Limit per object; with more, the whole object is refused."""


class _Notes(BaseModel):
    version: Literal[2] = 2  # the first format had them in the header: such an index is rebuilt
    refused: dict[int, str]
    unread: dict[str, str]


@dataclass(frozen=True)
class ObjectIndex:
    """One entry per row of an object, in row order."""

    digests: NDArray[np.uint8]
    """N x 32: sha256 of the prepared pixels; zeros for a refused row."""
    labels: NDArray[np.int64]
    splits: NDArray[np.uint8]
    """Positions in SPLITS."""
    refused: dict[int, str]
    unread: dict[str, str] = field(default_factory=dict)
    """Parts of the object without rows, by name, with the reason."""

    def __len__(self) -> int:
        return len(self.labels)

    def images(self) -> Iterator[tuple[bytes, int, bool]]:
        """Pixel digest, label, and whether it is a test image, of each row."""
        data = self.digests.tobytes()
        pixels = (data[i : i + 32] for i in range(0, len(data), 32))
        return zip(pixels, self.labels.tolist(), (self.splits == SPLITS.index("test")).tolist(), strict=True)


def pixel_digests(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """N x 32: the binary form of `images.pixel_digest` of each image."""
    joined = b"".join(hashlib.sha256(image.tobytes()).digest() for image in images)
    return np.frombuffer(joined, dtype=np.uint8).reshape(-1, 32)


def build_index(batches: Iterable[RowBatch], what: str = "images") -> ObjectIndex:
    """The index of the rows that the batches hold."""
    digests, labels, splits = [np.empty((0, 32), np.uint8)], [np.empty(0, np.int64)], [np.empty(0, np.uint8)]
    refused: dict[int, str] = {}
    for batch in batches:
        found = pixel_digests(batch.images).copy()
        found[[row - batch.first_row for row in batch.refused]] = 0
        digests.append(found)
        labels.append(batch.labels)
        splits.append(np.full(len(batch), SPLITS.index(batch.split), np.uint8))
        refused.update(batch.refused)
        if len(refused) > MAX_REFUSED_ROWS:
            first = next(iter(refused.items()))
            raise DataError(
                f"{what}: more than {MAX_REFUSED_ROWS:,} rows cannot be used, first row {first[0]}: {first[1]}."
            )
    return ObjectIndex(np.concatenate(digests), np.concatenate(labels), np.concatenate(splits), refused)


def dump_index(index: ObjectIndex) -> bytes:
    """The index as bytes."""
    notes = _Notes(refused=index.refused, unread=index.unread).model_dump_json().encode()
    arrays = {"digests": index.digests, "labels": index.labels, "splits": index.splits}
    return save({**arrays, "notes": np.frombuffer(notes, np.uint8)})


def parse_index(data: bytes, num_classes: int) -> ObjectIndex | None:
    """The inverse of `dump_index`; None when the bytes are not an index that this release understands."""
    try:
        tensors = load(data)
        notes = _Notes.model_validate_json(tensors["notes"].tobytes())
        digests, labels, splits = (tensors[name] for name in ("digests", "labels", "splits"))
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError):
        return None
    shapes = [(array.dtype.name, array.shape) for array in (digests, labels, splits)]
    rows = len(labels) if labels.ndim else -1
    if shapes != [("uint8", (rows, 32)), ("int64", (rows,)), ("uint8", (rows,))]:
        return None
    if not (np.all((labels >= REFUSED_LABEL) & (labels < num_classes)) and np.all(splits < len(SPLITS))):
        return None
    return ObjectIndex(digests, labels, splits, notes.refused, notes.unread)


def survey_of(raw: ObjectStore, path: Path, sha256: str, kind: ObjectFormat, name: str) -> Survey:
    """What a file with that digest says of its classes and pictures, read in another process or stored before.

    Raises as `isolated.ask` does.
    """
    known = read_state(raw, _survey_key(sha256), Survey)
    if known is not None:
        return known
    answer = ask("survey", {"path": str(path), "format": kind, "name": name}, name, path.stat().st_size)
    try:
        return Survey.model_validate_json(answer)
    except ValueError:
        raise DataError(f"{name}: the process that read the file did not answer. Do not use this file.") from None


def save_survey(raw: ObjectStore, sha256: str, survey: Survey) -> None:
    """Store what a file says of itself."""
    raw.write(_survey_key(sha256), survey.model_dump_json().encode())


def read_index(path: Path, kind: ObjectFormat, split: str, name: str, how: Preparation) -> ObjectIndex:
    """The index of a file's rows, read in another process: the file is untrusted. Raises as `isolated.ask` does."""
    arguments = {"path": str(path), "format": kind, "split": split, "name": name, "how": how.settings}
    index = parse_index(ask("index", arguments, name, path.stat().st_size), len(how.classes))
    if index is None:
        raise DataError(f"{name}: the process that read the file did not return an index. Do not use this file.")
    return index


def save_index(raw: ObjectStore, sha256: str, split: str, how: Preparation, index: ObjectIndex) -> None:
    """Store the index of an object with the given digest."""
    raw.write(_key(sha256, split, how), dump_index(index))


def load_index(raw: ObjectStore, sha256: str, split: str, how: Preparation) -> ObjectIndex | None:
    """The stored index of an object, or None when there is no readable one."""
    try:
        return parse_index(raw.read(_key(sha256, split, how)), len(how.classes))
    except ObjectNotFoundError:
        return None


def index_of(raw: ObjectStore, item: RawObject, how: Preparation, *, keep: bool = True) -> ObjectIndex:
    """The index of a stored object; with `keep`, a newly built index is stored."""
    index = load_index(raw, item.sha256, item.split, how)
    if index is None or len(index) != item.rows:
        with fetched(raw, item.key, item.sha256) as path:
            index = read_index(path, item.format, item.split, raw.uri(item.key), how)
        if keep:
            save_index(raw, item.sha256, item.split, how, index)
    return index


def _survey_key(sha256: str) -> str:
    return f"{INDEX_PREFIX}{sha256}-survey.json"


def _key(sha256: str, split: str, how: Preparation) -> str:
    return f"{INDEX_PREFIX}{sha256}-{split}-{how.key}.safetensors"
