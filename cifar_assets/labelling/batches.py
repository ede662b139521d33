"""Batches of pictures to label, and the labels that were given.

A batch is a folder `to-label/<name>/` of the raw bucket: PNG files, named by the digest of their pixels,
`manifest.json`, which is written last, and `labels.json`. What is saved is a Parquet file in `landing/`.
"""

import base64
import io
import json
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, RootModel, ValidationError

from cifar_assets.contracts import LANDING_PREFIX, TO_LABEL_PREFIX
from cifar_assets.traffic.records import Place
from resources.errors import DataError, ObjectNotFoundError
from resources.object_store import ObjectStore

_MANIFEST, _LABELS = "manifest.json", "labels.json"
_FEEDBACK = "feedback/"
Reason = Literal["drifted", "uncertain"]


class Picture(BaseModel, frozen=True):
    """A recorded picture, and why it should be labeled."""

    file: str
    request_id: str
    index: int
    guess: str
    confidence: float
    reason: Reason


class Batch(BaseModel, frozen=True):
    """The pictures of a batch, and the model that classified them."""

    model_digest: str
    classes: tuple[str, ...]
    pictures: tuple[Picture, ...]


class Label(BaseModel, frozen=True):
    """The class of a picture, who said so, and when."""

    label: str
    by: str
    time: datetime


_LabelsByFile = RootModel[dict[str, Label]]


def write_batch(raw: ObjectStore, name: str, batch: Batch, files: Sequence[bytes]) -> None:
    """Store the pictures' files, and then the manifest."""
    for picture, data in zip(batch.pictures, files, strict=True):
        raw.write(f"{TO_LABEL_PREFIX}{name}/{picture.file}", data)
    raw.write(f"{TO_LABEL_PREFIX}{name}/{_MANIFEST}", batch.model_dump_json(indent=1).encode())


def pictures_known(raw: ObjectStore) -> set[str]:
    """File names that the pictures of all batches have, and those that landed by feedback would have."""
    landed = {f"{PurePosixPath(info.key).stem}.png" for info in raw.list(LANDING_PREFIX + _FEEDBACK)}
    return landed | {info.key.rpartition("/")[2] for info in raw.list(TO_LABEL_PREFIX)}


def pictures_labeled(raw: ObjectStore) -> set[str]:
    """File names of the pictures in all batches that have a label."""
    return {file for _, labels in _all_labels(raw) for file in labels}


def newest_batch(raw: ObjectStore) -> str:
    """The name of the newest complete batch. DataError if there is none."""
    names = [info.key.split("/")[1] for info in raw.list(TO_LABEL_PREFIX) if info.key.endswith(f"/{_MANIFEST}")]
    if not names:
        raise DataError(f"{raw.uri(TO_LABEL_PREFIX)} has no batch: materialize pictures_to_label first.")
    return max(names)


def labels_given(raw: ObjectStore) -> dict[Place, str]:
    """The classes that people gave in all batches, by the places of the pictures in the record."""
    found: dict[Place, str] = {}
    for folder, labels in _all_labels(raw):
        with suppress(ObjectNotFoundError):  # what is left of a batch that was removed
            batch = Batch.model_validate_json(raw.read(folder + _MANIFEST))
            found |= {
                (each.request_id, each.index): labels[each.file].label for each in batch.pictures if each.file in labels
            }
    return found


def _all_labels(raw: ObjectStore) -> Iterator[tuple[str, dict[str, Label]]]:
    """The folder and the labels of each batch that has some."""
    for info in raw.list(TO_LABEL_PREFIX):
        if info.key.endswith(f"/{_LABELS}"):
            with suppress(ObjectNotFoundError):
                labels = _LabelsByFile.model_validate_json(raw.read(info.key)).root
                yield info.key.removesuffix(_LABELS), labels


def land_labels(raw: ObjectStore, name: str, classes: Sequence[str], rows: Iterable[tuple[bytes, str, Label]]) -> str:
    """Store PNG files with their request ids and labels as `landing/<name>.parquet`, and return that key.

    The file declares its classes, so that one of other classes is rejected. A file of that name is replaced.
    """
    files, request_ids, labels = zip(*rows, strict=True)
    images = pa.array(
        [{"bytes": data, "path": None} for data in files], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    )
    columns = {
        "img": images,
        "label": pa.array([classes.index(each.label) for each in labels], pa.int64()),
        "request_id": pa.array(request_ids, pa.string()),
        "labeled_by": pa.array([each.by for each in labels], pa.string()),
        "labeled_at": pa.array([each.time for each in labels], pa.timestamp("us", "UTC")),
    }
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata({"huggingface": _features(classes)}), buffer)
    key = f"{LANDING_PREFIX}{name}.parquet"
    raw.write(key, buffer.getvalue())
    return key


def _features(classes: Sequence[str]) -> bytes:
    return json.dumps({"info": {"features": {"label": {"names": list(classes)}}}}).encode()


def land_feedback(raw: ObjectStore, file: str, classes: Sequence[str], row: tuple[bytes, str, Label]) -> None:
    """Land a picture with its label, unless it landed with this label: writing it again would start a run.

    `file` is the picture's name in a batch. One file for each picture, since it cannot have two labels.
    """
    name = f"{_FEEDBACK}{PurePosixPath(file).stem}"
    with suppress(ObjectNotFoundError):
        table = pq.read_table(io.BytesIO(raw.read(f"{LANDING_PREFIX}{name}.parquet")))
        declared = (table.schema.metadata or {}).get(b"huggingface")
        if declared == _features(classes) and table["label"].to_pylist() == [classes.index(row[2].label)]:
            return
    land_labels(raw, name, classes, [row])


class Desk:
    """A batch with its pictures and labels. Each label is stored at once; `save` lands them."""

    def __init__(self, raw: ObjectStore, name: str | None, by: str):
        self.name = name or newest_batch(raw)
        self._raw = raw
        self._by = by
        self._folder = f"{TO_LABEL_PREFIX}{self.name}/"
        self._labels: dict[str, Label] = {}
        try:
            self._batch = Batch.model_validate_json(raw.read(self._folder + _MANIFEST))
            if raw.exists(self._folder + _LABELS):
                self._labels = _LabelsByFile.model_validate_json(raw.read(self._folder + _LABELS)).root
            self._files = {each.file: raw.read(self._folder + each.file) for each in self._batch.pictures}
        except (ValidationError, ObjectNotFoundError) as error:
            raise DataError(f"{raw.uri(self._folder)} is not a complete batch ({error}): label another.") from error
        self._lock = threading.Lock()

    def state(self) -> dict[str, Any]:
        """Classes, pictures with their PNG files in Base64, and labels in the order in which they were given."""
        pictures = [
            {**each.model_dump(), "png": base64.b64encode(self._files[each.file]).decode()}
            for each in self._batch.pictures
        ]
        labels = sorted(self._labels.items(), key=lambda item: item[1].time)
        return {
            "classes": self._batch.classes,
            "pictures": pictures,
            "labels": {file: label.label for file, label in labels},
        }

    def label(self, file: str, label: str | None) -> None:
        """Label a picture, or with None remove its label. DataError for an unknown picture or class."""
        if file not in self._files or label not in (None, *self._batch.classes):
            raise DataError(f"Batch {self.name} has no picture {file!r} or no class {label!r}: reload the page.")
        with self._lock:
            labels = {name: given for name, given in self._labels.items() if name != file}
            if label is not None:
                labels[file] = Label(label=label, by=self._by, time=datetime.now(UTC))
            self._raw.write(self._folder + _LABELS, _LabelsByFile(labels).model_dump_json().encode())
            self._labels = labels

    def save(self) -> dict[str, Any]:
        """Land all labels, in place of those that this batch or feedback landed before. DataError if there are none."""
        with self._lock:
            rows = [
                (self._files[each.file], each.request_id, self._labels[each.file])
                for each in self._batch.pictures
                if each.file in self._labels
            ]
            if not rows:
                raise DataError(f"Batch {self.name} has no labels: give some first.")
            for info in self._raw.list(LANDING_PREFIX + _FEEDBACK):
                if f"{PurePosixPath(info.key).stem}.png" in self._labels:
                    self._raw.delete(info.key)
            return {
                "saved": len(rows),
                "key": land_labels(self._raw, f"labeled/{self.name}", self._batch.classes, rows),
            }
