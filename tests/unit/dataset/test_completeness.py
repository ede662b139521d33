"""Files that someone is still writing into the landing folder are left alone (case C04)."""

import gzip
import io
import os
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cifar_assets.dataset.completeness import SETTLED_SECONDS
from cifar_assets.dataset.landing import scan_landing
from cifar_assets.object_store import FolderStore


def parquet() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"label": list(range(100))}), buffer)
    return buffer.getvalue()


def picture(format_name: str) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, format_name)
    return buffer.getvalue()


WHOLE = {
    "rows.parquet": parquet(),
    "batch.tar.gz": gzip.compress(bytes(range(256)) * 64),
    "cat/one.png": picture("PNG"),
    "cat/one.jpg": picture("JPEG"),
}


def put(raw: FolderStore, name: str, data: bytes, age_seconds: float = 0) -> Path:
    """Like `cp` in progress: no rename at the end."""
    path = raw.root / "landing" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    then = datetime.now(UTC).timestamp() - age_seconds
    os.utime(path, (then, then))
    return path


@pytest.fixture
def raw(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path)


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_file_that_grows_waits_until_it_is_whole(raw: FolderStore, name: str, share: float) -> None:
    data = WHOLE[name]
    put(raw, name, data[: int(len(data) * share)])
    scan = scan_landing(raw)
    assert scan.ready == ()
    assert scan.skipped == {f"landing/{name}": "still being written"}
    put(raw, name, data)
    assert [info.key for info in scan_landing(raw).ready] == [f"landing/{name}"]


@pytest.mark.parametrize("name", WHOLE)
def test_a_file_that_stays_broken_is_left_to_validation(raw: FolderStore, name: str) -> None:
    put(raw, name, WHOLE[name][:60], age_seconds=SETTLED_SECONDS + 5)
    assert [info.key for info in scan_landing(raw).ready] == [f"landing/{name}"]
