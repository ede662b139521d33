"""For any bytes, a reader of untrusted data returns correct data or raises this project's own error."""

import io
import json
import pickle
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import event, example, given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from cifar_assets.contracts import CLASSES
from cifar_assets.dataset.formats.archive import BATCHES, read_archive
from cifar_assets.dataset.formats.encoded import pack_images, read_encoded
from cifar_assets.dataset.formats.images import ImageError, prepare_image
from cifar_assets.dataset.formats.pickles import load_fields
from cifar_assets.dataset.index import build_index, dump_index, parse_index, read_index
from cifar_assets.dataset.landing.zone import classify_landing_object
from cifar_assets.dataset.sources import download
from cifar_assets.dataset.sources.importing import import_source
from cifar_assets.dataset.versions.processed import ProcessedManifest, read_processed
from cifar_assets.dataset.versions.raw import RawManifest, current_raw_digest, read_raw
from cifar_assets.dataset.versions.shards import map_shard
from cifar_assets.landing_decision import LandingCursor
from resources.digests import sha256_bytes
from resources.errors import DataError, ExplainedError
from resources.object_store import FolderStore
from tests.unit.dataset.conftest import AS_IS, HOW
from tests.unit.dataset.test_damage import attempt
from tests.unit.dataset.test_images import chunk

pytestmark = pytest.mark.fuzz

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda values: st.lists(values, max_size=4) | st.dictionaries(st.text(max_size=10), values, max_size=4),
    max_leaves=12,
)

_ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
_DTYPE = b"cnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb"
_OPCODES = st.sampled_from(
    [bytes([code]) for code in range(256)] + [b"(", b"t", b"R", b"b", b"0", b"2", b"\x85", b"\x86"]
)
_FRAGMENTS = st.one_of(
    _OPCODES,
    st.sampled_from([_ARRAY, _DTYPE, b"cnumpy\nndarray\n", b"c_codecs\nencode\n", b"}", b"]", b")", b"N", b"\x94"]),
    st.sampled_from([b"cos\nsystem\n", b"cbuiltins\neval\n", b"cnumpy.core.numeric\n_frombuffer\n", b"q\0", b"h\0"]),
    st.integers(-(2**40), 2**40).map(lambda value: b"I%d\n" % value),
    st.binary(max_size=8).map(lambda data: b"C" + bytes([len(data)]) + data),
    st.sampled_from(["data", "labels", "latin1", "u1", "|"]).map(
        lambda text: b"\x8c" + bytes([len(text)]) + text.encode()
    ),
    st.tuples(st.sampled_from(b"BTX\x8d\x8e\x96\x8a\x8b\x95jrG"), st.binary(min_size=8, max_size=8)).map(
        lambda pair: bytes([pair[0]]) + pair[1]
    ),
)


@given(st.lists(_FRAGMENTS, max_size=40), st.booleans())
def test_program_of_pickle_opcodes(fragments: list[bytes], is_value: bool) -> None:
    program = b"".join(fragments)
    program = b"(S'data'\n" + program + b"d." if is_value else program + b"."
    fields, error = attempt(lambda: load_fields(program, "batch"))
    assert error is None or error.startswith("batch")
    if fields is not None:
        event("loaded")
        for key, value in fields.items():
            assert type(key) is str
            if isinstance(value, np.ndarray):
                assert value.dtype.kind in "biufcSU"
                assert value.tobytes() is not None


@given(
    st.binary(max_size=64), st.lists(st.integers(-3, 70), max_size=3), st.sampled_from(["u1", ">i4", "i8", "f4", "O"])
)
def test_array_of_a_pickle(data: bytes, shape: list[int], kind: str) -> None:
    state = b"".join(b"I%d\n" % side for side in shape)
    order, letters = kind[0] if kind[0] in "<>" else "|", kind.lstrip("<>")
    array = (
        _ARRAY
        + b"(I1\n("
        + state
        + b"t"
        + f"cnumpy\ndtype\n(S'{letters}'\nI0\nI1\ntR(I3\nS'{order}'\n".encode()
        + b"NNNI-1\nI-1\nI0\ntbI00\n\x8e"
        + struct.pack("<Q", len(data))
        + data
        + b"tb"
    )
    try:
        found = load_fields(b"(S'data'\n" + array + b"d.", "batch")["data"]
    except DataError:
        return
    assert found.tobytes() == data
    assert list(found.shape) == shape


_NAMES = st.one_of(
    st.sampled_from(
        [*BATCHES, *(f"{name}.bin" for name in BATCHES), "batches.meta", "batches.meta.txt", "readme.html"]
    ),
    st.sampled_from(["../x", "/x", "a/../../x", "C:/x", "..\\x", "data_batch_9", "x" * 300, "\u00e9", "a\nb"]),
    st.text(max_size=20),
)
_TYPES = st.sampled_from([tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, b"6", b"S", b"x", b"L"])
_PAX_KEYS = st.sampled_from(["size", "path", "GNU.sparse.map", "GNU.sparse.major", "GNU.sparse.size"])
_PAX_VALUES = st.text("0123456789,x", max_size=12)


@st.composite
def batches(draw: DrawFn) -> bytes:
    labels = draw(st.lists(st.integers(0, 9) | st.integers(-1, 300), min_size=1, max_size=3))
    labels = labels if draw(st.integers(0, 9)) else []
    if draw(st.booleans()):
        return b"".join(bytes([label % 256]) + bytes(3072) for label in labels)
    return pickle.dumps({"data": np.zeros((len(labels), 3072), np.uint8), "labels": labels}, draw(st.integers(0, 5)))


@st.composite
def archives(draw: DrawFn) -> bytes:
    buffer = io.BytesIO()
    pax, gnu = tarfile.PAX_FORMAT, tarfile.GNU_FORMAT
    with tarfile.open(fileobj=buffer, mode="w", format=draw(st.sampled_from([pax, gnu]))) as tar:
        names = draw(st.sampled_from([list(BATCHES), [f"{name}.bin" for name in BATCHES], []]))
        for name in names + draw(st.just([]) | st.lists(_NAMES, max_size=4)):
            info, is_odd = tarfile.TarInfo(name), name not in names and draw(st.booleans())
            data = (name.endswith(".bin") and bytes(3073)) or draw(
                batches() | st.binary(max_size=50) if is_odd else batches()
            )
            info.size = draw(st.integers(0, 2**33)) if is_odd and draw(st.booleans()) else len(data)
            if is_odd:
                info.type, info.pax_headers = draw(_TYPES), draw(st.dictionaries(_PAX_KEYS, _PAX_VALUES, max_size=2))
            tar.addfile(info)
            buffer.write(data + bytes(-len(data) % 512))
            tar.offset = buffer.tell()
    return damage(draw, buffer.getvalue())


def damage(draw: DrawFn, data: bytes) -> bytes:
    """The bytes with a few changes, possibly truncated, and compressed with gzip up to twice."""
    found = bytearray(data)
    for position, value in draw(
        st.just([]) | st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), max_size=4)
    ):
        if found:
            found[position % len(found)] = value
    data = bytes(found[: draw(st.just(len(found)) | st.integers(0, len(found)))])
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        packer = zlib.compressobj(1, zlib.DEFLATED, 31)
        data = packer.compress(data) + packer.flush()
    return data


@given(archives())
def test_archive_of_any_members(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(data)
    unread: dict[str, str] = {}
    index, error = attempt(lambda: build_index(read_archive(path, "it", AS_IS, unread)))
    assert error is None or "it" in error
    if index is not None:
        event("read")
        assert len(index) > 0


_IMAGE = st.none() | st.binary(max_size=20) | st.sampled_from([bytes(100), chunk(b"IHDR", bytes(13))])


@st.composite
def tables(draw: DrawFn) -> pa.Table:
    """Tables that match the expected layout exactly or almost."""
    rows = draw(st.integers(0, 6))
    kind = draw(st.sampled_from([pa.binary()] * 4 + [pa.large_binary(), pa.string(), pa.list_(pa.int8())]))
    struct_type = pa.struct([(draw(st.sampled_from(["bytes"] * 5 + ["data"])), kind), ("path", pa.string())])
    name = struct_type[0].name
    value = st.just([1, 2]) if pa.types.is_list(kind) else st.just("x") if pa.types.is_string(kind) else _IMAGE
    row = st.none() | st.fixed_dictionaries({name: value, "path": st.none() | st.just("p")})
    images = pa.array(draw(st.lists(row, min_size=rows, max_size=rows)), struct_type)
    number = draw(
        st.sampled_from(
            [pa.int64()] * 4 + [pa.uint8(), pa.uint64(), pa.float32(), pa.bool_(), pa.dictionary(pa.int8(), pa.int64())]
        )
    )
    numbers = pa.array(draw(st.lists(st.none() | st.integers(0, 1), min_size=rows, max_size=rows)), pa.int64())
    labels = numbers.dictionary_encode() if pa.types.is_dictionary(number) else numbers.cast(number)
    names = [draw(st.sampled_from(["img"] * 5 + ["image", "x"])), draw(st.sampled_from(["label"] * 5 + ["img"]))]
    table = pa.table([images, labels], names=names)
    if draw(st.booleans()):
        features = draw(JSON | st.just({"label": {"names": draw(st.sampled_from([list(CLASSES), ["cat"]]))}}))
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    return table


@given(st.data())
def test_parquet_file_of_any_table(tmp_path: Path, data: st.DataObject) -> None:
    table, buffer = data.draw(tables()), io.BytesIO()
    pq.write_table(
        table,
        buffer,
        row_group_size=data.draw(st.integers(1, 4)),
        compression=data.draw(st.sampled_from(["none", "snappy", "gzip", "zstd", "brotli", "lz4"])),
        use_dictionary=data.draw(st.booleans()),
        data_page_version=data.draw(st.sampled_from(["1.0", "2.0"])),
    )
    is_damaged = data.draw(st.booleans())
    path = tmp_path / "a.parquet"
    path.write_bytes(data.draw(damaged(buffer.getvalue())) if is_damaged else buffer.getvalue())
    index, error = attempt(lambda: read_index(path, "parquet", "train", "it", HOW))
    if error is not None:
        assert "it" in error
        event(error[:40])
    if index is not None:
        event("read")
        assert is_damaged or len(index) == table.num_rows


def test_parquet_file_with_a_column_name_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"img": [{"bytes": b"", "path": ""}], "label": [0]}), path)
    path.write_bytes(path.read_bytes().replace(b"label", b"\x80abel"))
    _, error = attempt(lambda: read_index(path, "parquet", "train", "it", HOW))
    assert error is not None
    assert "it is not a readable Parquet file" in error


@st.composite
def damaged(draw: DrawFn, data: bytes) -> bytes:
    return damage(draw, data)


@given(st.lists(st.tuples(_NAMES, st.binary(max_size=30)), max_size=4), st.data())
def test_tar_of_pictures(tmp_path: Path, members: list[tuple[str, bytes]], data: st.DataObject) -> None:
    path = tmp_path / "a.tar"
    pack_images(path, [(f"cat/{name}".replace("\0", ""), content) for name, content in members])
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    index, error = attempt(lambda: build_index(read_encoded(path, "images", "train", "it", HOW)))
    assert error is None or "it" in error
    assert index is None or len(index.refused) == len(index)


@st.composite
def png_files(draw: DrawFn) -> bytes:
    depth, color = draw(st.sampled_from([1, 2, 4, 8, 16])), draw(st.sampled_from([0, 2, 3, 4, 6]) | st.integers(0, 255))
    width, height = draw(st.integers(0, 40)), draw(st.integers(0, 40))
    size = (1 + (width * depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(color, 1) + 7) // 8) * height
    rows = (draw(st.binary(max_size=60)) * (size + 1))[: size + draw(st.integers(-3, 3))]
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, draw(st.sampled_from([0, 0, 0, 1, 2])))
    kinds = st.sampled_from(
        [b"PLTE", b"tRNS", b"eXIf", b"iTXt", b"zTXt", b"gAMA", b"acTL", b"fcTL", b"IHDR", b"IDAT", b"IEND"]
    )
    extra = draw(st.lists(st.tuples(kinds, st.binary(max_size=30)), max_size=3))
    parts = [
        chunk(b"IHDR", header),
        *(chunk(*each) for each in extra),
        chunk(b"IDAT", zlib.compress(rows)),
        chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(png_files())
def test_png_of_any_chunks(data: bytes) -> None:
    try:
        prepared = prepare_image(data, 32)
    except ImageError:
        return
    event("decoded")
    assert prepared.shape == (3, 32, 32)


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(st.lists(st.tuples(st.integers(0xC0, 0xFF), st.binary(max_size=40)), max_size=8), st.binary(max_size=60))
def test_jpeg_of_any_segments(segments: list[tuple[int, bytes]], rest: bytes) -> None:
    parts = [bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data for marker, data in segments]
    frame = b"\xff\xc0\0\x0b\x08\0\x20\0\x20\1\1\x11\0"
    try:
        prepare_image(b"\xff\xd8" + b"".join(parts) + frame + b"\xff\xda\0\x08\1\1\0\0?\0" + rest, 32)
    except ImageError:
        return
    event("decoded")


_INDEX = dump_index(build_index([]))


@given(damaged(_INDEX) | st.binary(max_size=60) | JSON.map(lambda value: frame(json.dumps(value).encode())))
def test_index_of_any_bytes(data: bytes) -> None:
    index = parse_index(data, 10)
    assert index is None or len(index.digests) == len(index.labels) == len(index.splits)


def frame(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + bytes(200)


_OFFSET = st.integers(-2, 220) | st.integers() | st.floats() | st.text(max_size=3)
_TENSOR = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "I32", "I64", "F64", 5]),
        "shape": st.lists(_OFFSET, max_size=4),
        "data_offsets": st.lists(_OFFSET, max_size=3),
    }
)


@given(JSON | st.dictionaries(st.sampled_from(["images", "labels", "__metadata__"]), _TENSOR), st.integers(0, 300))
def test_shard_of_any_header(tmp_path: Path, header: Any, size: int) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(frame(json.dumps(header).encode())[:size])
    tensors, _ = attempt(lambda: map_shard(path))
    if tensors is not None:
        event("mapped")
        assert all(tensor.nbytes <= 200 for tensor in tensors.values())


@st.composite
def documents(draw: DrawFn, document: dict[str, Any]) -> bytes:
    """A JSON document with one of its values, at any depth, replaced or removed; or any JSON."""
    if draw(st.integers(0, 5)) == 0:
        return json.dumps(draw(JSON)).encode()
    copy = place = json.loads(json.dumps(document))
    while True:
        keys = [*place] if isinstance(place, dict) else [*range(len(place))]
        key = draw(st.sampled_from(keys))
        if isinstance(place[key], dict | list) and place[key] and draw(st.booleans()):
            place = place[key]
        else:
            break
    if draw(st.booleans()):
        place[key] = draw(JSON)
    else:
        del place[key]
    return json.dumps(copy).encode()


_OBJECT = {
    "key": "k",
    "sha256": "0" * 64,
    "size": 1,
    "format": "parquet",
    "role": "landed",
    "split": "train",
    "rows": 2,
}
_RAW = RawManifest.model_validate({"resize": True, "objects": [{**_OBJECT, "excluded": [[0, 1]]}]}).model_dump(
    mode="json"
)
_PROCESSED = {
    "kind": "cifar10-processed/2",
    "raw_digest": "0" * 64,
    "config": {"validation_fraction": 0.1},
    "preparation": 1,
    "mean": [0.5] * 3,
    "std": [0.2] * 3,
    "shards": {"train": []},
    "counts": {"train": {"cat": 1}},
}


@given(documents(_RAW) | documents(_PROCESSED))
def test_manifest_of_any_document(raw: FolderStore, data: bytes) -> None:
    digest = sha256_bytes(data)
    raw.write(f"versions/{digest}/manifest.json", data)
    raw.write(f"{digest}/manifest.json", data)
    for read, kind in ((read_raw, RawManifest), (read_processed, ProcessedManifest)):
        try:
            assert isinstance(read(raw, digest), kind)
        except DataError:
            continue
        event("read")
    raw.write("current.json", data)
    attempt(lambda: current_raw_digest(raw))


@given(
    documents({"version": 1, "covered": ["0" * 16], "sequence": 1, "attempt": 1, "run_key": "k"})
    | st.binary(max_size=40)
)
def test_cursor_of_any_text(data: bytes) -> None:
    cursor, note = LandingCursor.load(data.decode(errors="replace"))
    assert not (cursor.covered and note)


_WORDS = st.sampled_from(
    [
        "synthetic",
        "download",
        "cat",
        "test",
        "a.parquet",
        "a.tar.gz",
        "%2e",
        "%00",
        "..",
        "#md5=",
        "#sha256=0",
        ":",
        "/",
        "?x=1",
        "@",
        "[",
        " ",
        "\u00e9",
        "\udcff",
        "\0",
    ]
)
_SCHEMES = st.sampled_from(
    [
        "",
        "",
        "synthetic:",
        "s3://",
        "s3:/",
        "http://127.0.0.1:9/",
        "http://[",
        "https://\u00e9/",
        "x://",
    ]
)


def no_network(*arguments: object, **options: object) -> None:
    raise ConnectionRefusedError


@given(_SCHEMES, st.lists(_WORDS | st.text(max_size=5), max_size=5))
@example("s3://", ["\udcff"])
@example("https://", ["\udcff"])
@example("", ["a" * 5000])
@example("s3://", ["["])
@example("", ["~0"])
@example("https://", ["[", "::1", "/x.tar.gz"])
@example("http://", ["host:port/x.tar.gz"])
@example("https://", ["a\u2100b/x.tar.gz"])
def test_any_source_address(
    tmp_path: Path, raw: FolderStore, monkeypatch: pytest.MonkeyPatch, scheme: str, words: list[str]
) -> None:
    address = scheme + "".join(words)
    if address.startswith(("/", "~", ".", "download", "synthetic")):
        address = f"./{address}"  # neither a file of this machine nor a dataset of many rows
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setattr("socket.create_connection", no_network)
    try:
        import_source(address, raw)
    except ExplainedError as error:
        event(type(error).__name__)


@given(st.lists(_WORDS | st.text(max_size=5), max_size=6), st.integers(0, 5))
def test_any_landed_name(words: list[str], size: int) -> None:
    reason = classify_landing_object("landing/" + "".join(words), size)
    assert reason is None or reason
