"""Files that kill the process that reads them."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cifar_assets.dataset.formats import isolated
from cifar_assets.dataset.formats.isolated import ReaderKilledError, ask
from cifar_assets.dataset.versions.raw import build_raw_version
from resources.errors import ExplainedError
from resources.object_store import FolderStore
from tests.unit.dataset.rejections import reason_of, rejected_keys

FAULT = """
import os, signal
index_file, seen = child.index_file, []
def faulty(**arguments):
    seen.append(arguments['name'])
    if CONDITION:
        FAULT
    return index_file(**arguments)
child.index_file = faulty
"""


def fault(code: str, condition: str = "'bad' in seen[-1]") -> str:
    return FAULT.replace("CONDITION", condition).replace("FAULT", code)


@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
        ("os._exit(3)", "exit status 3"),
        ("raise MemoryError", "needs too much memory"),
        ("bytearray(8 << 30)", "needs too much memory"),
    ],
)
def test_landed_file_that_kills_its_reader_is_rejected(
    code: str, cause: str, make, raw: FolderStore, source: str, child
) -> None:
    raw.write("landing/bad.parquet", make.parquet(make.images(2, 5), make.labels(2)))
    raw.write("landing/good.parquet", make.parquet(make.images(2, 6), make.labels(2)))
    child(fault(code))
    version = build_raw_version(raw, source)
    assert version.manifest.rows == 82
    (rejected,) = version.landing.rejected
    assert rejected.moved_to in rejected_keys(raw, "bad.parquet")
    assert cause in reason_of(raw, "bad.parquet")["reason"]


@pytest.mark.parametrize(("code", "cause"), [("while True: pass", "CPU time"), ("signal.pause()", "too long")])
def test_file_that_does_not_end_is_rejected(
    code: str, cause: str, make, raw: FolderStore, source: str, child, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_raw_version(raw, source)
    raw.write("landing/bad.parquet", make.parquet(make.images(2, 5), make.labels(2)))
    cpu_seconds, wall_seconds = (5, 5) if "pause" in code else (1, 400)
    monkeypatch.setattr(isolated, "CPU_SECONDS", cpu_seconds)
    monkeypatch.setattr(isolated, "WALL_SECONDS_PER_CPU_SECOND", wall_seconds // cpu_seconds)
    child(fault(code))
    assert build_raw_version(raw, source).manifest.rows == 80
    assert cause in reason_of(raw, "bad.parquet")["reason"]


def test_source_file_that_kills_its_reader_is_named(make, raw: FolderStore, tmp_path: Path, child) -> None:
    path = tmp_path / "bad.parquet"
    path.write_bytes(make.parquet(make.images(2, 5), make.labels(2)))
    child(fault("os.kill(os.getpid(), signal.SIGSEGV)"))
    with pytest.raises(ReaderKilledError, match=r"bad\.parquet crashed its reader with SIGSEGV \(limits: 1,024 MiB"):
        build_raw_version(raw, str(path))


def test_unexpected_reader_error_does_not_stop_the_build(make, raw: FolderStore, source: str, child) -> None:
    raw.write("landing/bad.parquet", make.parquet(make.images(2, 5), make.labels(2)))
    child(fault("1 / 0"))
    version = build_raw_version(raw, source)
    assert version.manifest.rows == 80
    assert "ZeroDivisionError" in version.landing.skipped["landing/bad.parquet"]
    child("")
    assert build_raw_version(raw, source).manifest.rows == 82


def test_reader_that_does_not_start_rejects_no_file(make, raw: FolderStore, source: str, child) -> None:
    build_raw_version(raw, source)
    raw.write("landing/good.parquet", make.parquet(make.images(2, 6), make.labels(2)))
    child("raise SystemExit(7)")
    with pytest.raises(ExplainedError, match="does not start: it ended with exit status 7"):
        build_raw_version(raw, source)
    assert raw.exists("landing/good.parquet")


def test_process_has_no_credentials_and_no_heavy_libraries(child, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    child("import os, sys\nchild.index_file = lambda: ' '.join([*sys.modules, *os.environ]).encode()")
    found = ask("index", {}, "nothing", 0).decode().split()
    assert not {"torch", "dagster", "mlflow", "kubernetes", "AWS_SECRET_ACCESS_KEY"} & set(found)
    assert {"pyarrow", "PIL"} <= set(found)


def test_file_is_not_blamed_for_a_process_that_read_others(make, raw: FolderStore, source: str, child) -> None:
    for number in range(3):
        raw.write(f"landing/{number}.parquet", make.parquet(make.images(2, 5 + number), make.labels(2)))
    child(fault("os._exit(1)", "len(seen) == 2"))
    assert build_raw_version(raw, source).manifest.rows == 86


def test_answer_that_is_too_large_is_refused(child, monkeypatch: pytest.MonkeyPatch) -> None:
    child("child.index_file = lambda: bytes(2 << 20)")
    assert len(ask("index", {}, "it", 0)) == 2 << 20
    monkeypatch.setattr(
        isolated, "receive", lambda connection: (json.loads(connection.recv_bytes()), connection.recv_bytes(1 << 20))
    )
    with pytest.raises(ReaderKilledError, match="it crashed its reader"):
        ask("index", {}, "it", 0)


def test_archive_that_unpacks_to_too_much_is_rejected(make, raw: FolderStore, source: str) -> None:
    members = make.python_members() | {"cifar-10-batches-py/data_batch_1": bytes(400 << 20)}
    raw.write("landing/bad.tar.gz", make.tar(members))
    build_raw_version(raw, source)
    assert "at most 67,108,864 are read" in reason_of(raw, "bad.tar.gz")["reason"]


@pytest.mark.parametrize(
    ("mebibytes", "reason"), [(24, "at most 20971520 bytes, got 25165824 bytes"), (100, "needs too much memory")]
)
def test_small_parquet_of_large_values_is_rejected(
    mebibytes: int, reason: str, raw: FolderStore, source: str, child, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    row = pa.array([{"bytes": bytes(mebibytes << 20), "path": "x"}], kind)
    table = pa.table({"img": row.take(pa.array(np.zeros(16, np.int64))), "label": np.zeros(16, np.int64)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", dictionary_pagesize_limit=1 << 30)
    assert buffer.tell() < 20_000
    raw.write("landing/bad.parquet", buffer.getvalue())
    child("")  # so that the next test gets a new process with the usual limit
    monkeypatch.setattr(isolated, "MEMORY_BYTES", 768 << 20)
    build_raw_version(raw, source)
    assert reason in reason_of(raw, "bad.parquet")["reason"]
