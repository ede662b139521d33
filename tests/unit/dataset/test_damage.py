"""Random damage: a clear error or the right data, never anything else."""

import pickle
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cifar_assets.dataset.formats.archive import read_archive
from cifar_assets.dataset.formats.parquet import read_parquet
from cifar_assets.dataset.formats.pickles import load_plain
from cifar_assets.dataset.index import build_index
from cifar_assets.dataset.objects import RawObject, ranges_of
from cifar_assets.errors import DataError

_BATCH = pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1, 2], "names": ["a", "b"]}, protocol=2)
SHARED = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


T = TypeVar("T")


def attempt(call: Callable[[], T]) -> tuple[T | None, str | None]:
    """What the call gives, or the text of its DataError; any other exception is a fault."""
    try:
        return call(), None
    except DataError as error:
        return None, str(error)


def damaged(data: bytes, position: int, change: int, cut: int) -> bytes:
    position %= len(data)
    flipped = data[:position] + bytes([data[position] ^ change]) + data[position + 1 :]
    return flipped[: len(flipped) - cut % len(flipped)]


_DAMAGE = (st.integers(0, 2**30), st.integers(0, 255), st.one_of(st.just(0), st.integers(0, 2**30)))


@SHARED
@given(st.binary(max_size=200))
def test_any_bytes_as_a_pickle(data: bytes) -> None:
    _, error = attempt(lambda: load_plain(data, "batch"))
    assert error is None or "batch" in error


@settings(max_examples=300, deadline=None)
@given(*_DAMAGE)
def test_a_damaged_pickle(position: int, change: int, cut: int) -> None:
    _, error = attempt(lambda: load_plain(damaged(_BATCH, position, change, cut), "batch"))
    assert error is None or "batch" in error


@SHARED
@given(*_DAMAGE)
def test_a_damaged_archive(make, tmp_path: Path, position: int, change: int, cut: int) -> None:
    good = make.archive()
    path = tmp_path / "a.tar.gz"
    path.write_bytes(damaged(good, position, change, cut))
    index, error = attempt(lambda: build_index(read_archive(path, "the archive")))
    assert error is None or "the archive" in error
    if index is not None:
        path.write_bytes(good)
        expected = build_index(read_archive(path, "the archive"))
        assert np.array_equal(index.digests, expected.digests)
        assert np.array_equal(index.labels, expected.labels)


@SHARED
@given(*_DAMAGE)
def test_a_damaged_parquet_file(make, tmp_path: Path, position: int, change: int, cut: int) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(damaged(make.parquet(make.images(10), make.labels(10)), position, change, cut))
    batches, error = attempt(lambda: list(read_parquet(path, "train", "the file", resize=False)))
    assert error is None or "the file" in error
    if batches is not None:
        assert sum(len(batch) for batch in batches) <= 10
        assert all(batch.images.shape[1:] == (3, 32, 32) for batch in batches)


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


@pytest.mark.parametrize("claim", [b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", b"\x80\x02T\xff\xff\xff\x7f."])
def test_a_length_that_is_only_claimed_is_not_allocated(claim: bytes) -> None:
    with pytest.raises(DataError):
        load_plain(claim, "batch")
