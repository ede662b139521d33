"""Random damage: a clear error or the right data, never anything else."""

import io
import pickle
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cifar_assets.dataset.formats.archive import read_archive
from cifar_assets.dataset.formats.encoded import read_encoded
from cifar_assets.dataset.formats.images import prepare_image
from cifar_assets.dataset.formats.pickles import load_fields
from cifar_assets.dataset.index import build_index
from cifar_assets.dataset.objects import RawObject, ranges_of
from resources.errors import DataError
from tests.unit.dataset.conftest import AS_IS

_BATCH = pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1, 2], "names": ["a", "b"]}, protocol=2)

T = TypeVar("T")
pytestmark = pytest.mark.fuzz


def attempt(call: Callable[[], T]) -> tuple[T | None, str | None]:
    """The result of the call, or the text of its DataError. Any other exception is a bug."""
    try:
        return call(), None
    except DataError as error:
        return None, str(error)


def damaged(data: bytes, position: int, change: int, cut: int) -> bytes:
    position %= len(data)
    flipped = data[:position] + bytes([data[position] ^ change]) + data[position + 1 :]
    return flipped[: len(flipped) - cut % len(flipped)]


_DAMAGE = (st.integers(0, 2**30), st.integers(0, 255), st.one_of(st.just(0), st.integers(0, 2**30)))


@given(st.binary(max_size=200))
def test_any_bytes_as_a_pickle(data: bytes) -> None:
    _, error = attempt(lambda: load_fields(data, "batch"))
    assert error is None or "batch" in error


@given(*_DAMAGE)
def test_a_damaged_pickle(position: int, change: int, cut: int) -> None:
    _, error = attempt(lambda: load_fields(damaged(_BATCH, position, change, cut), "batch"))
    assert error is None or "batch" in error


@given(*_DAMAGE)
def test_a_damaged_archive(make, tmp_path: Path, position: int, change: int, cut: int) -> None:
    good = make.archive()
    path = tmp_path / "a.tar.gz"
    path.write_bytes(damaged(good, position, change, cut))
    index, error = attempt(lambda: build_index(read_archive(path, "the archive", AS_IS)))
    assert error is None or "the archive" in error
    if index is not None:
        path.write_bytes(good)
        expected = build_index(read_archive(path, "the archive", AS_IS))
        assert np.array_equal(index.digests, expected.digests)
        assert np.array_equal(index.labels, expected.labels)


@given(*_DAMAGE)
def test_a_damaged_parquet_file(make, tmp_path: Path, position: int, change: int, cut: int) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(damaged(make.parquet(make.images(10), make.labels(10)), position, change, cut))
    batches, error = attempt(lambda: list(read_encoded(path, "parquet", "train", "the file", AS_IS)))
    assert error is None or "the file" in error
    if batches is not None:
        assert sum(len(batch) for batch in batches) <= 10
        assert all(batch.images.shape[1:] == (3, 32, 32) for batch in batches)


def picture(kind: str, **options: Any) -> bytes:
    pixels = np.add.outer(np.arange(0, 64, 2), np.arange(0, 128, 4)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(options.pop("mode", "RGB")).save(buffer, kind, **options)
    return buffer.getvalue()


_PICTURES = [
    picture("PNG"),
    picture("PNG", mode="P", transparency=3),
    picture("PNG", mode="RGBA", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"),
    picture("JPEG"),
    picture("JPEG", progressive=True, comment="x" * 20),
    picture("JPEG", mode="L"),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(st.sampled_from(_PICTURES), st.lists(st.tuples(*_DAMAGE), min_size=1, max_size=6), st.booleans())
def test_a_damaged_picture(data: bytes, damage: list[tuple[int, int, int]], valid_checksums: bool) -> None:
    for position, change, cut in damage:
        data = damaged(data, position, change, cut) or b"x"
    if valid_checksums and data.startswith(b"\x89PNG"):
        data = with_checksums(data)
    image, error = attempt(lambda: prepare_image(data, 32))
    assert error is None or error.startswith("Expected ")
    assert image is None or (image.shape == (3, 32, 32) and image.dtype == np.uint8)


def with_checksums(data: bytes) -> bytes:
    """The PNG with its chunks' checksums corrected, so that damage reaches what is behind them."""
    parts, position = [data[:8]], 8
    while position + 12 <= len(data):
        length = int.from_bytes(data[position : position + 4], "big")
        body = data[position + 4 : position + 8 + length]
        parts += [data[position : position + 4], body, zlib.crc32(body).to_bytes(4, "big")]
        position += 12 + length
    return b"".join(parts)


@given(st.sets(st.integers(0, 60)))
def test_ranges_name_exactly_the_rows(rows: set[int]) -> None:
    ranges = ranges_of(rows)
    assert {row for start, stop in ranges for row in range(start, stop)} == rows
    assert all(before[1] < after[0] for before, after in pairwise(ranges))
    item = RawObject(
        key="k", sha256="0", size=1, format="parquet", role="landed", split="train", rows=61, excluded=ranges
    )
    assert np.flatnonzero(~item.used()).tolist() == sorted(rows)
    assert item.used_rows == 61 - len(rows)
