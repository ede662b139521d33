"""The record of served traffic: Parquet files, each with a batch of one server's answers.

A key such as `2026-11-27/143002-5d0c1a7e.parquet` has the time in UTC at which the file was written. A row is one
image. The file's metadata has what its rows share, and the number of responses by HTTP status, recorded or not.
"""

import io
import secrets
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from cifar_assets.contracts import ImageSpec
from cifar_assets.traffic.statistics import STATISTICS, image_statistics
from resources.errors import BucketNotFoundError, DataError
from resources.object_store import ObjectStore

if TYPE_CHECKING:
    import pyarrow as pa

MAX_IMAGES, _MAX_BYTES = 20_000, 512 << 20
"""The most that is read at a time."""
_METADATA = b"cifar10-traffic/1"
_KEY_FORMAT = "%Y-%m-%d/%H%M%S"
_KEY_LENGTH = len("2026-11-27/143002")


Place = tuple[str, int]
"""An image by its request's id and its position in the request."""


class Feedback(BaseModel, frozen=True):
    """What a program says is the class of an image."""

    request_id: str
    index: int
    label: str
    time: float
    """When, in seconds since the epoch."""

    @property
    def place(self) -> Place:
        return self.request_id, self.index


class BatchInfo(BaseModel, frozen=True):
    """What the rows of a file share."""

    model_digest: str
    model_version: str
    images: ImageSpec
    responses: dict[str, int]
    """Number of responses by HTTP status since the server's previous file, recorded or not."""
    feedback: tuple[Feedback, ...] = ()
    """What came since the server's previous file, about images of any file."""


@dataclass(frozen=True)
class Answered:
    """A request with its images, uint8 (N, 3, size, size), and the probabilities in its answer (N, classes)."""

    request_id: str
    time: float
    """When it was answered, in seconds since the epoch."""
    seconds: float
    """From the complete request to the answer."""
    images: NDArray[np.uint8]
    probabilities: NDArray[np.floating]


def write_batch(store: ObjectStore, answers: Sequence[Answered], info: BatchInfo, *, keep_pixels: bool) -> str:
    """Store a file, possibly without rows. Returns its key."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    shape, num_classes = info.images.image_shape, len(info.images.classes)
    counts = [len(answer.images) for answer in answers]
    images = np.concatenate([np.empty((0, *shape), np.uint8), *(answer.images for answer in answers)])
    images = np.ascontiguousarray(images)
    rows = np.concatenate([np.empty((0, num_classes)), *(answer.probabilities for answer in answers)])
    statistics = image_statistics(images)
    pixels = pa.nulls(len(images), pa.binary(int(np.prod(shape))))
    if keep_pixels and len(images):
        pixels = pa.FixedSizeBinaryArray.from_buffers(pixels.type, len(images), [None, pa.py_buffer(images)])

    def repeated(values: Iterable[Any]) -> list[Any]:
        return [value for value, count in zip(values, counts, strict=True) for _ in range(count)]

    columns = {
        "request_id": pa.array(repeated(answer.request_id for answer in answers), pa.string()),
        "index": pa.array([index for count in counts for index in range(count)], pa.int32()),
        "time": pa.array(repeated(int(answer.time * 1e6) for answer in answers), pa.int64()).cast(
            pa.timestamp("us", "UTC")
        ),
        "seconds": pa.array(repeated(answer.seconds for answer in answers), pa.float32()),
        "model_digest": pa.array([info.model_digest] * len(images), pa.string()),
        "probabilities": pa.FixedSizeListArray.from_arrays(rows.astype(np.float32).ravel(), num_classes),
        **{name: pa.array(statistics[:, column]) for column, name in enumerate(STATISTICS)},
        "pixels": pixels,
    }
    table = pa.table(columns).replace_schema_metadata({_METADATA: info.model_dump_json()})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    key = f"{datetime.now(UTC):{_KEY_FORMAT}}-{secrets.token_hex(4)}.parquet"
    store.write(key, buffer.getvalue())
    return key


@dataclass(frozen=True)
class Traffic:
    """The recorded answers of one model, in the order in which they were written."""

    info: BatchInfo
    """Of the newest file, with the responses and the feedback of all files."""
    table: "pa.Table"

    def __len__(self) -> int:
        return self.table.num_rows

    def column(self, name: str) -> NDArray[Any]:
        """The values of a column of numbers or times."""
        return self.table[name].to_numpy()

    @property
    def statistics(self) -> NDArray[np.float32]:
        """One row for each image, one column for each of STATISTICS."""
        return np.stack([self.column(name) for name in STATISTICS], axis=1)

    @property
    def probabilities(self) -> NDArray[np.float32]:
        """One row for each image, one column for each class."""
        values = self.table["probabilities"].combine_chunks().flatten().to_numpy()  # pyright: ignore[reportAttributeAccessIssue]
        return values.reshape(len(self), len(self.info.images.classes))

    @property
    def places(self) -> list[Place]:
        """One for each image."""
        return list(zip(self.table["request_id"].to_pylist(), self.table["index"].to_pylist(), strict=True))

    def image(self, row: int) -> NDArray[np.uint8] | None:
        """The pixels (3, size, size) of one image; None if they were not recorded."""
        data = self.table["pixels"][row].as_py()
        return None if data is None else np.frombuffer(data, np.uint8).reshape(self.info.images.image_shape)

    def distinct_pictures(self) -> NDArray[np.int64]:
        """Rows of distinct pictures whose pixels were recorded, the one recorded last at the end."""
        last = {pixels: row for row, pixels in enumerate(self.table["pixels"].to_pylist()) if pixels is not None}
        return np.asarray(sorted(last.values()), np.int64)


def read_traffic(store: ObjectStore, start: datetime, end: datetime) -> list[Traffic]:
    """The files written from start to before end, by model, the one recorded last at the end.

    If there are more than MAX_IMAGES, or too many large ones, only the newest files. Raises DataError for a file that
    is not a record.
    """
    import pyarrow as pa

    found: defaultdict[str, list[tuple[BatchInfo, pa.Table]]] = defaultdict(list)
    num_images = num_bytes = 0
    for key in reversed(list(_keys(store, start, end))):
        info, table = _read(store, key)
        num_images, num_bytes = num_images + table.num_rows, num_bytes + table.nbytes
        if num_images > MAX_IMAGES or num_bytes > _MAX_BYTES:
            break
        found[info.model_digest].append((info, table))
    traffic = []
    for files in found.values():
        responses = sum((Counter(info.responses) for info, _ in files), Counter())
        feedback = tuple(each for info, _ in reversed(files) for each in info.feedback)
        newest = files[0][0].model_copy(update={"responses": dict(sorted(responses.items())), "feedback": feedback})
        traffic.append(Traffic(newest, pa.concat_tables(table for _, table in reversed(files))))
    return traffic[::-1]


def read_window(store: ObjectStore, window: str) -> list[Traffic]:
    """`read_traffic` for a data version of the asset `served_traffic`."""
    return read_traffic(store, *map(datetime.fromisoformat, window.split("/")))


def _keys(store: ObjectStore, start: datetime, end: datetime) -> Iterator[str]:
    first, last = (f"{each.astimezone(UTC):{_KEY_FORMAT}}" for each in (start, end))
    with suppress(BucketNotFoundError):  # without recording there may be no bucket
        for day in range((end - start).days + 2):
            for info in store.list(f"{start.astimezone(UTC) + timedelta(days=day):%Y-%m-%d}/"):
                if first <= info.key[:_KEY_LENGTH] < last:
                    yield info.key


def _read(store: ObjectStore, key: str) -> tuple[BatchInfo, "pa.Table"]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(io.BytesIO(store.read(key)))
        info = BatchInfo.model_validate_json((table.schema.metadata or {}).get(_METADATA, b""))
    except (pa.ArrowException, ValueError) as error:
        raise DataError(f"{store.uri(key)} is not a record of served traffic ({error}): remove it.") from error
    return info, table.replace_schema_metadata(None)
