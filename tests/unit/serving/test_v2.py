"""V2 tensors against their declaration."""

import json
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifar_assets.contracts import CIFAR10
from cifar_assets.serving import v2
from cifar_assets.serving.answers import GoneError, Query, RequestError, Response, ServedModel
from cifar_assets.serving.app import _parse
from cifar_assets.serving.classifier import softmax
from cifar_assets.serving.http import Request
from cifar_assets.serving.settings import ServingLimits

LIMITS = ServingLimits()
IMAGES = np.random.default_rng(5).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
FLAT = IMAGES.ravel().tolist()
LOGITS = np.random.default_rng(1).normal(size=(2, 10)).astype(np.float32)
MODEL = ServedModel("cifar10", "7", "a" * 64, "d" * 64, CIFAR10)


def parse(body: bytes, header_length: bytes | None = None) -> Query:
    headers = {} if header_length is None else {b"inference-header-content-length": header_length}
    return v2.parse(MODEL, headers, body, LIMITS)


def tensor(**changes: Any) -> dict[str, Any]:
    values = {"name": "images", "datatype": "UINT8", "shape": [2, 3, 32, 32], "data": FLAT, **changes}
    return {name: value for name, value in values.items() if value is not ...}


def request(**changes: Any) -> bytes:
    return json.dumps({"inputs": [tensor()], **changes}).encode()


def with_tensor(**changes: Any) -> bytes:
    return json.dumps({"inputs": [tensor(**changes)]}).encode()


def binary(size: Any = 6144, pixels: bytes = IMAGES.tobytes(), **changes: Any) -> tuple[bytes, bytes]:
    header = with_tensor(data=..., parameters={"binary_data_size": size}, **changes)
    return header + pixels, str(len(header)).encode()


def test_flat_nested_and_binary_data_are_the_same_tensor() -> None:
    bodies = [(with_tensor(), None), (with_tensor(data=IMAGES.tolist()), None), binary()]
    bodies.append((bodies[0][0], str(len(bodies[0][0])).encode()))
    for body, header_length in bodies:
        np.testing.assert_array_equal(parse(body, header_length).images(), IMAGES)


@pytest.mark.parametrize(
    ("changes", "field", "expected", "received"),
    [
        ({"data": FLAT[:-1]}, "inputs[0].data", "[6144]", "shape [6143]"),
        ({"data": [*FLAT, 0]}, "inputs[0].data", "[6144]", "shape [6145]"),
        ({"data": IMAGES[:1].tolist()}, "inputs[0].data", "[6144]", "shape [1, 3, 32, 32]"),
        ({"data": IMAGES.transpose(0, 2, 3, 1).tolist()}, "inputs[0].data", "[6144]", "shape [2, 32, 32, 3]"),
        ({"data": [IMAGES.tolist()]}, "inputs[0].data", "[6144]", "shape [1, 2, 3, 32, 32]"),
        ({"data": [[FLAT[:32]] * 32] * 3}, "inputs[0].data", "[6144]", "shape [3, 32, 32]"),
        ({"data": [*IMAGES[:1].tolist(), []]}, "inputs[0].data", "[6144]", "ragged"),
        ({"data": []}, "inputs[0].data", "[6144]", "shape [0]"),
        ({"data": ...}, "inputs[0].data", "6144 numbers", "none"),
        ({"data": "AAAA"}, "inputs[0].data", "a valid list", "'AAAA'"),
        ({"data": [*FLAT[:-1], "7"]}, "inputs[0].data", "whole numbers", "'7'"),
        ({"data": [*FLAT[:-1], 0.5]}, "inputs[0].data", "whole numbers", "0.5"),
        ({"data": [*FLAT[:-1], True]}, "inputs[0].data", "whole numbers", "true"),
        ({"data": [*FLAT[:-1], None]}, "inputs[0].data", "whole numbers", "null"),
        ({"data": [*FLAT[:-1], 256]}, "inputs[0].data", "0 to 255", "to 256"),
        ({"data": [*FLAT[:-1], -1]}, "inputs[0].data", "0 to 255", "from -1"),
        ({"shape": [1, 3, 32, 32]}, "inputs[0].data", "[3072]", "shape [6144]"),
        ({"shape": [2, 32, 32, 3]}, "inputs[0].shape", "[N, 3, 32, 32]", "[2, 32, 32, 3]"),
        ({"shape": [3, 32, 32]}, "inputs[0].shape", "[N, 3, 32, 32]", "[3, 32, 32]"),
        ({"shape": [-1, 3, 32, 32]}, "inputs[0].shape", "[N, 3, 32, 32]", "[-1, 3, 32, 32]"),
        ({"shape": [0, 3, 32, 32]}, "inputs[0].shape", "[N, 3, 32, 32]", "[0, 3, 32, 32]"),
        ({"shape": ["2", 3, 32, 32]}, "inputs[0].shape[0]", "a valid integer", "'2'"),
        ({"shape": [2.0, 3, 32, 32]}, "inputs[0].shape[0]", "a valid integer", "2.0"),
        ({"shape": [True, 3, 32, 32]}, "inputs[0].shape[0]", "a valid integer", "true"),
        ({"shape": []}, "inputs[0].shape", "[N, 3, 32, 32]", "[]"),
        ({"shape": None}, "inputs[0].shape", "a valid list", "null"),
        ({"shape": "2,3,32,32"}, "inputs[0].shape", "a valid list", "'2,3,32,32'"),
        ({"shape": ...}, "inputs[0].shape", "a value", "keys ['data', 'datatype', 'name']"),
        ({"shape": [[2], 3, 32, 32]}, "inputs[0].shape[0]", "a valid integer", "a list of 1"),
        ({"datatype": "FP32"}, "inputs[0].datatype", "'UINT8'", "'FP32'"),
        ({"datatype": "uint8"}, "inputs[0].datatype", "'UINT8'", "'uint8'"),
        ({"datatype": "BYTES"}, "inputs[0].datatype", "'UINT8'", "'BYTES'"),
        ({"datatype": None}, "inputs[0].datatype", "'UINT8'", "null"),
        ({"datatype": ["UINT8"]}, "inputs[0].datatype", "'UINT8'", "a list"),
        ({"parameters": {"binary_data_size": "6144"}}, "inputs[0].parameters.binary_data_size", "integer", "'6144'"),
        ({"name": "input_1"}, "inputs[0].name", "'images'", "'input_1'"),
        ({"name": ...}, "inputs[0].name", "a value", "keys ['data', 'datatype', 'shape']"),
        ({"parameters": 3}, "inputs[0].parameters", "a valid dictionary", "3"),
        (
            {"data": ..., "parameters": {"binary_data_size": 6144}},
            "inputs[0].data",
            "the header Inference-Header-Content-Length",
            "none",
        ),
    ],
)
def test_a_tensor_unlike_its_declaration_is_refused(changes, field, expected, received) -> None:
    with pytest.raises(RequestError) as caught:
        parse(with_tensor(**changes))
    assert caught.value.status == 400
    assert caught.value.field.startswith(field)
    assert expected in caught.value.expected
    assert received in caught.value.received


def test_huge_declared_shape_allocates_nothing() -> None:
    with pytest.raises(RequestError, match="at most 64 images, got 1000000000") as caught:
        parse(with_tensor(shape=[10**9, 3, 32, 32]))
    assert caught.value.status == 413


@pytest.mark.parametrize(
    ("body", "field", "received"),
    [
        (b"", "body", "0 bytes"),
        (b"{", "body", "not valid JSON"),
        (b"[]", "body", "a list"),
        (b"{}", "inputs", "keys []"),
        (request(inputs=[]), "inputs", "a list of 0"),
        (request(inputs=None), "inputs", "null"),
        (request(inputs={"images": 1}), "inputs", "an object"),
        (request(inputs=[3]), "inputs[0]", "3"),
        (request(inputs=[tensor(), tensor(name="mask")]), "inputs", "a list of 2"),
        (request(inputs=[tensor(), tensor()]), "inputs", "a list of 2"),
        (request(outputs=[{"name": "logits"}] * 3), "outputs", "a list of 3"),
        (request(outputs=[{"name": "logits"}] * 65_000), "outputs", "a list of 65000"),
        (request(id=3), "id", "3"),
        (request(id="x" * 1025), "id", "(1025 characters)"),
        (request(parameters=[]), "parameters", "a list"),
        (request(parameters={"binary_data_output": "yes"}), "parameters.binary_data_output", "'yes'"),
        (request(outputs=3), "outputs", "3"),
        (request(outputs=["logits"]), "outputs[0]", "'logits'"),
        (request(outputs=[{"name": "labels"}]), "outputs[0].name", "'labels'"),
        (request(outputs=[{"name": ["logits"]}]), "outputs[0].name", "a list"),
        (request(outputs=[{"name": "logits", "parameters": 1}]), "outputs[0].parameters", "1"),
        (
            request(outputs=[{"name": "logits", "parameters": {"binary_data": 1}}]),
            "outputs[0].parameters.binary_data",
            "1",
        ),
    ],
)
def test_a_bad_request_is_refused(body, field, received) -> None:
    with pytest.raises(RequestError) as caught:
        parse(body)
    assert caught.value.status == 400
    assert caught.value.field == field
    assert received in caught.value.received


def test_a_large_request_whose_client_has_gone_is_not_parsed() -> None:
    gone = Request(lambda _: None, "POST", "/", {}, request(), keep_alive=True, is_wanted=False)
    with pytest.raises(GoneError):
        _parse(gone, partial(v2.parse, MODEL), LIMITS)


def answer(parsed: Query) -> dict[str, Any]:
    return json.loads(parsed.render(LOGITS).body)


def test_null_is_the_same_as_absent() -> None:
    outputs = [{"name": "logits", "parameters": None}, {"name": "probabilities", "parameters": {"binary_data": None}}]
    body = {"id": None, "parameters": None, "inputs": [tensor(parameters=None)], "outputs": outputs}
    assert [output["name"] for output in answer(parse(json.dumps(body).encode()))["outputs"]] == [
        "logits",
        "probabilities",
    ]
    body["parameters"], body["outputs"] = {"binary_data_output": None}, None
    assert answer(parse(json.dumps(body).encode())) == answer(parse(request()))
    parameters = {"binary_data_size": None}
    np.testing.assert_array_equal(parse(with_tensor(parameters=parameters)).images(), IMAGES)
    header = with_tensor(data=None, parameters={"binary_data_size": 6144})
    parsed = parse(header + IMAGES.tobytes(), str(len(header)).encode())
    np.testing.assert_array_equal(parsed.images(), IMAGES)


@pytest.mark.parametrize("length", ["", "-1", "abc", "1e3", "99999999999999999999", "7000000", "\u0661"])
def test_impossible_header_length_is_rejected(length) -> None:
    with pytest.raises(RequestError, match="Inference-Header-Content-Length"):
        parse(binary()[0], length.encode())


def test_a_header_length_that_cuts_the_json_is_refused() -> None:
    body, length = binary()
    for wrong in (0, int(length) - 1, int(length) + 1):
        with pytest.raises(RequestError, match="JSON"):
            parse(body, str(wrong).encode())


@pytest.mark.parametrize(
    ("size", "num_bytes"), [(6144, 6143), (6144, 6145), (6144, 0), (6143, 6143), (0, 0), (-1, 6144)]
)
def test_a_byte_count_that_is_not_the_product_of_the_shape_is_refused(size, num_bytes) -> None:
    pixels = (IMAGES.tobytes() + b"\0")[:num_bytes]
    with pytest.raises(RequestError, match=r"6144 bytes"):
        parse(*binary(size, pixels))


def test_bytes_that_nothing_declares_and_data_given_twice_are_refused() -> None:
    header = with_tensor()
    with pytest.raises(RequestError, match="no data in JSON when binary data follows"):
        parse(header + b"abc", str(len(header)).encode())
    header = with_tensor(data=...)
    with pytest.raises(RequestError, match="binary_data_size: expected 6144 bytes"):
        parse(header + b"abc", str(len(header)).encode())
    header = with_tensor(parameters={"binary_data_size": 6144})
    with pytest.raises(RequestError, match="no data in JSON"):
        parse(header + IMAGES.tobytes(), str(len(header)).encode())


def header_length(answer: Response) -> int:
    return int(dict(answer.headers)["Inference-Header-Content-Length"])


class TestAnswer:
    def test_json_carries_both_outputs_and_the_model(self) -> None:
        answer = parse(request(id="r1")).render(LOGITS)
        assert answer.headers == ()
        value = json.loads(answer.body)
        assert (value["id"], value["model_name"], value["model_version"]) == ("r1", "cifar10", "7")
        assert value["parameters"] == {"model_digest": "a" * 64}
        outputs = {output["name"]: output for output in value["outputs"]}
        assert list(outputs) == ["probabilities", "logits"]
        for output in outputs.values():
            assert (output["datatype"], output["shape"]) == ("FP32", [2, 10])
        np.testing.assert_allclose(outputs["logits"]["data"], LOGITS.ravel(), rtol=1e-6)
        np.testing.assert_allclose(outputs["probabilities"]["data"], softmax(LOGITS).ravel(), rtol=1e-6)

    def test_binary_outputs_follow_the_json_in_order(self) -> None:
        outputs = [{"name": "logits", "parameters": {"binary_data": True}}, {"name": "probabilities"}]
        answer = parse(request(outputs=outputs)).render(LOGITS)
        length = header_length(answer)
        value = json.loads(answer.body[:length])
        assert value["outputs"][0]["parameters"] == {"binary_data_size": 80}
        assert "data" not in value["outputs"][0]
        assert len(value["outputs"][1]["data"]) == 20
        logits = np.frombuffer(answer.body[length:], "<f4").reshape(2, 10)
        np.testing.assert_array_equal(logits, LOGITS)

    def test_a_request_may_ask_for_all_outputs_as_binary(self) -> None:
        answer = parse(request(parameters={"binary_data_output": True})).render(LOGITS)
        assert len(answer.body) - header_length(answer) == 160

    def test_extreme_logits_give_finite_probabilities(self) -> None:
        logits = np.array([[1e30, -1e30, *[0] * 8]], np.float32)
        assert softmax(logits).tolist() == [[1.0, *[0.0] * 9]]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.fuzz
@given(name=st.sampled_from(["name", "shape", "datatype", "data", "parameters", "inputs", "outputs", "id"]), value=JSON)
def test_any_value_in_any_place_is_accepted_or_refused(name, value) -> None:
    top = name in ("inputs", "outputs", "id")
    body = request(**{name: value}) if top else with_tensor(**{name: value})
    try:
        parsed = parse(body.replace(b"Infinity", b"1"))
    except RequestError as error:
        parsed = error
    assert isinstance(parsed, (Query, RequestError))
    if isinstance(parsed, RequestError):
        assert 400 <= parsed.status < 500
