"""Bodies of every kind, changed at random, sent to a real server: none is a fault of the server."""

import io
import json
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cifar_assets.serving.page import PREDICT_PATH
from resources.object_store import FolderStore
from tests.unit.serving.server_process import ServerProcess, form, run_server
from tests.unit.serving.tiny_model import store_tiny_model

PREDICT = "/v1/models/cifar10:predict"
INFER = "/v2/models/cifar10/infer"


def picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("fuzz")
    with run_server(*store_tiny_model(FolderStore(folder / "models")), folder) as server:
        yield server
        assert "Traceback" not in server.log


VALID_BODIES = [
    (
        PREDICT,
        json.dumps({"instances": [[[[1, 2, 3]]], "AAAA", {"b64": ""}]}).encode(),
        "application/json",
        {},
    ),
    (PREDICT, *form(("image", picture("PNG")), ("image", picture("JPEG"))), {}),
    (PREDICT_PATH, *form(("image", picture("PNG"))), {}),
    (INFER, json.dumps({"id": "a", "inputs": [{"name": "images", "shape": [1, 3, 32, 32]}]}).encode(), None, {}),
    (INFER, json.dumps({"inputs": []}).encode() + bytes(3072), "application/octet-stream", {"length": "14"}),
]


@pytest.mark.fuzz
@given(
    valid=st.sampled_from(VALID_BODIES),
    position=st.integers(0, 2000),
    num_cut=st.integers(0, 50),
    value=st.binary(max_size=50) | st.sampled_from([b"[" * 5000, b"9" * 5000, b'"' * 99, b"null", b"\r\n--a-boundary"]),
    header=st.sampled_from(["", "-1", "9" * 30, "14", "\xb2"]),
)
def test_any_body_is_answered_and_never_with_a_fault_of_the_server(
    server, valid, position, num_cut, value, header
) -> None:
    path, body, content_type, headers = valid
    changed = body[:position] + value + body[position + num_cut :]
    named = {"Inference-Header-Content-Length": header or headers.get("length")} if header or headers else {}
    answer = server.post(path, changed, content_type, **named)
    assert answer.status in (200, 400, 413, 415), answer.body
    assert answer.status == 200 or answer.json["error"]
