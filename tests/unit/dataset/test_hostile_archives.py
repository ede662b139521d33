"""Archives and pickles that would write or run something."""

import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from cifar_assets.dataset.formats.archive import read_archive
from cifar_assets.dataset.formats.pickles import load_fields
from cifar_assets.dataset.versions.raw import build_raw_version, current_raw_digest
from resources.errors import DataError
from resources.object_store import FolderStore
from tests.unit.dataset.conftest import AS_IS
from tests.unit.dataset.rejections import read_rejected, reason_of


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def extras(outside: str) -> dict[str, list[tuple[tarfile.TarInfo, bytes]]]:
    return {
        "parent folder": [(member("../../evil.txt"), b"evil")],
        "parent in the middle": [(member("cifar-10-batches-py/../../evil.txt"), b"evil")],
        "backslashes": [(member("..\\..\\evil.txt"), b"evil")],
        "absolute path": [(member(f"{outside}/evil.txt"), b"evil")],
        "drive letter": [(member("C:/evil.txt"), b"evil")],
        "file through a link": [
            (member("cifar-10-batches-py/out", tarfile.SYMTYPE, outside), b""),
            (member("cifar-10-batches-py/out/evil.txt"), b"evil"),
        ],
        "hard link": [(member("cifar-10-batches-py/passwd", tarfile.LNKTYPE, "/etc/passwd"), b"")],
        "device": [(member("cifar-10-batches-py/null", tarfile.CHRTYPE), b"")],
        "pipe": [(member("cifar-10-batches-py/pipe", tarfile.FIFOTYPE), b"")],
    }


@pytest.mark.parametrize("name", list(extras("/")))
def test_a_member_that_points_elsewhere_is_named_and_nothing_is_written(
    name: str, make, raw: FolderStore, source: str, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    infos = extras(str(outside))[name]
    data = make.tar(make.python_members(7), infos)
    raw.write("landing/batch.tar.gz", data)
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(data)
    before = {path for path in tmp_path.rglob("*") if "store" not in path.parts}
    with pytest.raises(DataError) as caught:
        build_raw_version(raw, str(path))
    assert repr(infos[0][0].name) in str(caught.value)
    assert current_raw_digest(raw) is None
    assert build_raw_version(raw, source).manifest.rows == 80
    assert repr(infos[0][0].name) in reason_of(raw, "batch.tar.gz")["reason"]
    assert read_rejected(raw, "batch.tar.gz") == data
    assert list(raw.list("landing/")) == []
    assert {path for path in tmp_path.rglob("*") if "store" not in path.parts} <= before
    assert list(outside.iterdir()) == []


class Touch:
    """Pickles into a call of `os.open` that would create the file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.open, (self.path, os.O_CREAT)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_runs_code_never_runs(protocol: int, make, raw: FolderStore, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    members = make.python_members()
    batch = {"data": np.zeros((1, 3072), np.uint8), "labels": [Touch(marker)]}
    members["cifar-10-batches-py/data_batch_3"] = pickle.dumps(batch, protocol=protocol)
    path = tmp_path / "a.tar.gz"
    path.write_bytes(make.tar(members))
    with pytest.raises(DataError, match=r"data_batch_3.*contains (posix|os)\.open"):
        build_raw_version(raw, str(path))
    assert not marker.exists()
    assert list(raw.list("objects/")) == []


@pytest.mark.parametrize(
    "payload",
    [
        b"cbuiltins\neval\n(S'1+1'\ntR.",
        b"cbuiltins\ngetattr\n(cnumpy\nndarray\nS'tofile'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy.core.multiarray\nfromstring\n(S'x'\ntR.",
        b"c__main__\nanything\n.",
        b"ccodecs\nopen\n(S'x'\ntR.",
        b"\x80\x02c_codecs\nlookup\nX\x01\x00\x00\x00x\x85R.",
        b"cnumpy\ndtype\n(S'O'\ntR.",
        b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.__new__\x93.",
    ],
)
def test_pickle_globals_other_than_arrays_are_rejected(payload: bytes) -> None:
    with pytest.raises(DataError, match="batch"):
        load_fields(payload, "batch")


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"garbage",
        pickle.dumps({"a": 2})[:-1],
        b"\x80\x02j\xff\xff\xff\xff.",
        b"\x80\x02Nr\xff\xff\xff\x7f.",
        b"Np99999999999\n.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x02T\xff\xff\xff\x7f.",
        pickle.dumps([1]),
        pickle.dumps({5: 1}),
    ],
)
def test_invalid_pickle_is_a_clear_error(payload: bytes) -> None:
    with pytest.raises(DataError, match="batch is not a readable pickle"):
        load_fields(payload, "batch")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_plain_values_load(protocol: int) -> None:
    value = {
        "array": np.arange(12, dtype=np.uint8).reshape(3, 4),
        "big": np.arange(6, dtype=">i4").reshape(2, 3, order="F"),
        "empty": np.zeros((0, 3), np.int64),
        "float": np.array([0.5, np.pi]),
        "text": np.array(["a", "bc"]),
        "list": [1, -(2**70), 1.5, True, None, "text \u00e4", b"\x00\xff", (1, [2], {"3": 4})],
    }
    data = pickle.dumps(value, protocol=protocol)
    loaded, trusted = load_fields(data, "batch"), pickle.loads(data)
    assert loaded["list"] == value["list"]
    for name in ("array", "big", "empty", "float", "text"):
        assert loaded[name].dtype.newbyteorder("=") == trusted[name].dtype.newbyteorder("=")
        assert np.array_equal(loaded[name], value[name])


_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
_DTYPE = b"cnumpy\ndtype\n(S'u1'\nI0\nI1\ntR"


@pytest.mark.parametrize(
    "payload",
    [
        # A state of dtype that the file chose: numpy would then read and write past the array.
        _DTYPE + b"(I3\nS'|'\n(S'u1'\n(I1000000\nttNNI1000000\nI1\nI0\ntb.",
        _ARRAY + b"(I1\n(I1000000\nt" + _DTYPE + b"(I3\nS'|'\nNNNI1000000\nI1\nI0\ntbI00\nS'x'\ntb.",
        # Sizes that do not match the data, and negative ones.
        _ARRAY + b"(I1\n(I5\nt" + _DTYPE + b"I00\nS'x'\ntb.",
        _ARRAY + b"(I1\n(I-1\nI-1\nt" + _DTYPE + b"I00\nS'x'\ntb.",
        # Objects, and lists or functions treated as objects.
        b"(lp0\n(dS'append'\nI1\nsb.",
        b"cnumpy\ndtype\n(dS'call'\nI1\nsb.",
        b"cnumpy\nndarray\n(dS'__new__'\nI1\nsb.",
        b"cnumpy\nndarray\n(I3\ntR.",
        b"\x80\x02cnumpy\nndarray\nI3\n\x85\x81.",
        b"(cnumpy\nndarray\nI3\no.",
        b"(I3\nidatetime\ndate\n.",
        b"\x80\x02I1\n\x82\x01.",
        b"\x80\x04\x8f(I1\n\x90.",
        b"I1\nQ.",
    ],
)
def test_pickle_cannot_change_objects(payload: bytes) -> None:
    with pytest.raises(DataError, match="batch"):
        load_fields(payload, "batch")


@pytest.mark.parametrize(
    "batch",
    [
        [1, 2, 3],
        {"data": np.zeros((2, 3072), np.uint8)},
        {"data": np.zeros((2, 3071), np.uint8), "labels": [0, 1]},
        {"data": np.zeros((2, 3072), np.float32), "labels": [0, 1]},
        {"data": np.zeros((2, 3072), np.uint8), "labels": [0]},
        {"data": np.zeros((2, 3072), np.uint8), "labels": [0, "cat"]},
        {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]},
        {"data": [[0] * 3072, [0]], "labels": [0, 1]},
        {"data": np.zeros((2, 3072), np.uint8), "labels": [[0], [1, 2]]},
        {"data": np.zeros((2, 3072), np.uint8), "labels": 5},
    ],
)
def test_a_batch_of_another_shape_is_refused(batch: object, make, raw: FolderStore, tmp_path: Path) -> None:
    members = make.python_members()
    members["cifar-10-batches-py/data_batch_2"] = pickle.dumps(batch)
    path = tmp_path / "a.tar.gz"
    path.write_bytes(make.tar(members))
    with pytest.raises(DataError, match=r"data_batch_2|out of range"):
        build_raw_version(raw, str(path))


def test_a_batch_given_twice_is_refused(make, raw: FolderStore, tmp_path: Path) -> None:
    data = make.python_members()["cifar-10-batches-py/data_batch_1"]
    path = tmp_path / "a.tar.gz"
    path.write_bytes(make.tar(make.python_members(), [(member("other/data_batch_1"), data)]))
    with pytest.raises(DataError, match="data_batch_1 twice"):
        build_raw_version(raw, str(path))


def test_nested_lists_are_not_expanded(make, raw: FolderStore, tmp_path: Path) -> None:
    nested: list = [0] * 64
    for _ in range(12):
        nested = [nested] * 64  # 64 ** 13 numbers, in a pickle of a kilobyte
    test_a_batch_of_another_shape_is_refused({"data": nested, "labels": nested}, make, raw, tmp_path)


@pytest.mark.parametrize("meta", [{"label_names": 5}, {"label_names": {}}, [], None])
def test_label_names_of_another_kind_are_refused(meta: object, make, raw: FolderStore, tmp_path: Path) -> None:
    members = make.python_members()
    members["cifar-10-batches-py/batches.meta"] = pickle.dumps(meta)
    path = tmp_path / "a.tar.gz"
    path.write_bytes(make.tar(members))
    with pytest.raises(DataError, match=r"expected a list of class names|expected a dict"):
        build_raw_version(raw, str(path))


def test_sparse_member_is_refused(make, raw: FolderStore, tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    odd = member("cifar-10-batches-py/data_batch_1")
    odd.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(1 << 40)}
    path.write_bytes(make.tar(make.python_members(), [(odd, b"x")]))
    with pytest.raises(DataError, match="special file"):
        build_raw_version(raw, str(path))


@pytest.mark.parametrize("name", ["data_batch_1.bin", "test_batch", "batches.meta"])
def test_member_that_claims_too_much_is_refused_before_it_is_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    odd = member(f"cifar-10-batches-py/{name}")
    odd.size = (64 << 20) + 1
    path.write_bytes(odd.tobuf())  # reading it would find the archive cut off
    with pytest.raises(DataError, match=f"{name}' declares 67,108,865 bytes; at most 67,108,864"):
        list(read_archive(path, "a.tar", AS_IS))


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_header_that_claims_too_much_is_refused_before_it_is_read(kind: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    first, odd = member("cifar-10-batches-py/readme.html"), member("x", kind)
    odd.size = (1 << 20) + 1
    for data in (odd.tobuf(), first.tobuf() + odd.tobuf()):
        path.write_bytes(data)
        with pytest.raises(DataError, match="a header claims 1,048,577 bytes; at most 1,048,576 are read"):
            list(read_archive(path, "a.tar", AS_IS))


def test_headers_without_end_are_refused(make, raw: FolderStore, source: str) -> None:
    long_name = member("x", tarfile.GNUTYPE_LONGNAME)
    long_name.size = 512
    raw.write("landing/batch.tar", (long_name.tobuf() + bytes(512)) * 2000)
    assert build_raw_version(raw, source).manifest.rows == 80
    assert "is not a readable tar archive" in reason_of(raw, "batch.tar")["reason"]


@pytest.mark.parametrize("name", ["data_batch_6", "data_batch_1.pkl", "test_batch_2.bin"])
def test_unknown_batch_is_an_error(name: str, make, raw: FolderStore, tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(make.tar(make.python_members(), [(member(f"cifar-10-batches-py/{name}"), b"x")]))
    with pytest.raises(DataError, match=f"{name}' is not a batch of the official archive"):
        build_raw_version(raw, str(path))
