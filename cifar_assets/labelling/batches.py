"""Batches of pictures to label, and the labels that were given.

A batch is a folder `to-label/<name>/` of the raw bucket: PNG files, named by the digest of their pixels,
`manifest.json`, which is written last, and `labels.json`. What is saved is a Parquet file in `landing/`.
"""

import io
import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, RootModel, ValidationError

from cifar_assets.contracts import LANDING_PREFIX, TO_LABEL_PREFIX
from resources.errors import DataError, ObjectNotFoundError
from resources.object_store import ObjectStore

_MANIFEST, _LABELS = "manifest.json", "labels.json"
Reason = Literal["drifted", "uncertain"]


class Picture(BaseModel, frozen=True):
    """A recorded picture, and why it should be labeled."""

    file: str
    request_id: str
    index: int
    time: datetime
    guess: str
    confidence: float
    reason: Reason


class Batch(BaseModel, frozen=True):
    """The pictures of a batch, and the model that classified them."""

    version: Literal[1] = 1
    model_digest: str
    model_version: str
    window: str
    """From when to when they were recorded."""
    classes: tuple[str, ...]
    pictures: tuple[Picture, ...]


class Label(BaseModel, frozen=True):
    """The class of a picture, who said so, and when."""

    label: str
    by: str
    time: datetime


Labels = RootModel[dict[str, Label]]
"""By file name."""


def write_batch(raw: ObjectStore, name: str, batch: Batch, files: Sequence[bytes]) -> None:
    """Store the pictures' files, and then the manifest."""
    for picture, data in zip(batch.pictures, files, strict=True):
        raw.write(f"{TO_LABEL_PREFIX}{name}/{picture.file}", data)
    raw.write(f"{TO_LABEL_PREFIX}{name}/{_MANIFEST}", batch.model_dump_json(indent=1).encode())


def pictures_asked(raw: ObjectStore) -> set[str]:
    """File names of the pictures in all batches."""
    return {info.key.rpartition("/")[2] for info in raw.list(TO_LABEL_PREFIX)}


def newest_batch(raw: ObjectStore) -> str:
    """The name of the newest complete batch. DataError if there is none."""
    keys = (info.key.removeprefix(TO_LABEL_PREFIX) for info in raw.list(TO_LABEL_PREFIX))
    names = [key.partition("/")[0] for key in keys if key.endswith(f"/{_MANIFEST}")]
    if not names:
        raise DataError(f"{raw.uri(TO_LABEL_PREFIX)} has no batch: materialize pictures_to_label first.")
    return max(names)


def read_batch(raw: ObjectStore, name: str) -> Batch:
    """The manifest of a batch. DataError if it is not one."""
    key = f"{TO_LABEL_PREFIX}{name}/{_MANIFEST}"
    try:
        return Batch.model_validate_json(raw.read(key))
    except ValidationError as error:
        raise DataError(f"{raw.uri(key)} is not the manifest of a batch ({error}): remove the batch.") from error


def read_picture(raw: ObjectStore, name: str, file: str) -> bytes:
    """The PNG file of a picture."""
    return raw.read(f"{TO_LABEL_PREFIX}{name}/{file}")


def read_labels(raw: ObjectStore, name: str) -> dict[str, Label]:
    """The labels given so far, by file name."""
    try:
        return Labels.model_validate_json(raw.read(f"{TO_LABEL_PREFIX}{name}/{_LABELS}")).root
    except ObjectNotFoundError:
        return {}


def write_labels(raw: ObjectStore, name: str, labels: dict[str, Label]) -> None:
    """Replace the labels of a batch."""
    raw.write(f"{TO_LABEL_PREFIX}{name}/{_LABELS}", Labels(labels).model_dump_json().encode())


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
    features = json.dumps({"info": {"features": {"label": {"names": list(classes)}}}})
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns).replace_schema_metadata({"huggingface": features}), buffer)
    key = f"{LANDING_PREFIX}{name}.parquet"
    raw.write(key, buffer.getvalue())
    return key
