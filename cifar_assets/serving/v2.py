"""V2 (open inference protocol) requests and answers, in JSON and with the binary data extension.

One input, `images`: UINT8, shape [N, 3, 32, 32], RGB pixels. Two outputs, `probabilities` and `logits`: FP32, [N, 10].
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import numpy as np
import orjson
from pydantic import BaseModel, Field

from cifar_assets.contracts import CLASSES, IMAGE_SHAPE, MODEL_INPUT
from cifar_assets.serving.answers import (
    Images,
    Logits,
    ModelIdentity,
    Query,
    RequestError,
    Response,
    shorten,
    softmax,
)
from cifar_assets.serving.json_body import body_type, check_count, describe, nested_pixels, parse_json
from cifar_assets.serving.settings import ServingLimits

_HEADER_LENGTH = "Inference-Header-Content-Length"
_BINARY_TYPE = "application/octet-stream"
OUTPUT_NAMES = ("probabilities", "logits")
INPUT_METADATA = {"name": MODEL_INPUT, "datatype": "UINT8", "shape": [-1, *IMAGE_SHAPE]}
OUTPUT_METADATA = [{"name": name, "datatype": "FP32", "shape": [-1, len(CLASSES)]} for name in OUTPUT_NAMES]


class _Parameters(BaseModel):
    binary_data: bool | None = None
    binary_data_output: bool | None = None
    binary_data_size: int | None = None


class _Input(BaseModel):
    name: Literal["images"]
    datatype: Literal["UINT8"]
    shape: list[int] = Field(fail_fast=True)
    data: list[Any] | None = None
    parameters: _Parameters | None = None


class _Output(BaseModel):
    name: Literal["probabilities", "logits"]
    parameters: _Parameters | None = None


class _Infer(BaseModel):
    id: str | None = Field(None, max_length=1024)
    inputs: list[_Input] = Field(max_length=1, fail_fast=True)
    outputs: list[_Output] | None = Field(None, max_length=len(OUTPUT_NAMES), fail_fast=True)
    parameters: _Parameters | None = None


def parse(headers: Mapping[bytes, bytes], body: bytes, limits: ServingLimits) -> Query:
    """Check a request against what the metadata promises. Raises RequestError.

    Nothing is allocated by a claimed size.
    """
    body_type(headers, _BINARY_TYPE.encode(), f"application/json or {_BINARY_TYPE}")
    json_size = headers.get(_HEADER_LENGTH.lower().encode())
    num_json_bytes = len(body)
    if json_size is not None:
        if not (json_size.isdigit() and len(json_size) <= 12) or int(json_size) > len(body):
            raise RequestError(_HEADER_LENGTH, f"a number of bytes up to the body's {len(body)}", shorten(json_size))
        num_json_bytes = int(json_size)
    request = parse_json(_Infer, body[:num_json_bytes], limits)
    if len(request.inputs) != 1:
        raise RequestError("inputs", f"a list of the one input {MODEL_INPUT!r}", describe(request.inputs))
    images = _images(request.inputs[0], None if json_size is None else body[num_json_bytes:], limits)
    return Query(0, lambda: images, partial(_render, request))


def _images(tensor: _Input, binary: bytes | None, limits: ServingLimits) -> Images:
    num_images, *shape = tensor.shape or [0]
    if tuple(shape) != IMAGE_SHAPE or num_images < 1:
        expected = f"[N, {', '.join(map(str, IMAGE_SHAPE))}] with N of at least 1"
        raise RequestError("inputs[0].shape", expected, shorten(tensor.shape))
    check_count("inputs[0].shape", num_images, limits)
    num_numbers = num_images * int(np.prod(IMAGE_SHAPE))
    if binary and tensor.data is not None:
        raise RequestError("inputs[0].data", "no data in JSON where bytes follow it", describe(tensor.data))
    if tensor.data is not None:
        return nested_pixels(
            "inputs[0].data", tensor.data, (num_numbers,), tuple(tensor.shape), fractions=False
        ).reshape(tensor.shape)
    size = tensor.parameters and tensor.parameters.binary_data_size
    if binary is None:
        expected = f"{num_numbers} numbers, or the header {_HEADER_LENGTH} and bytes"
        raise RequestError("inputs[0].data", expected, "none")
    if not size == len(binary) == num_numbers:
        received = f"{describe(size)}, and {len(binary)} bytes after the JSON"
        raise RequestError("inputs[0].parameters.binary_data_size", f"{num_numbers} bytes", received)
    return np.frombuffer(binary, dtype=np.uint8).reshape(tensor.shape)


def _render(request: _Infer, logits: Logits, identity: ModelIdentity) -> Response:
    """The answer to a request, whose images gave these logits of shape (N, 10)."""
    values = {"probabilities": softmax(logits).astype("<f4"), "logits": logits.astype("<f4")}
    all_binary = (request.parameters and request.parameters.binary_data_output) or False
    wanted = {output.name: output.parameters and output.parameters.binary_data for output in request.outputs or ()}
    outputs: list[dict[str, Any]] = []
    pieces: list[bytes] = []
    for name, own_binary in (wanted or dict.fromkeys(OUTPUT_NAMES)).items():
        array = values[name]
        output: dict[str, Any] = {"name": name, "datatype": "FP32", "shape": list(array.shape)}
        if all_binary if own_binary is None else own_binary:
            pieces.append(array.tobytes())
            output["parameters"] = {"binary_data_size": len(pieces[-1])}
        else:
            output["data"] = array.ravel().tolist()
        outputs.append(output)
    answer = {
        "model_name": identity.name,
        "model_version": identity.version,
        "parameters": {"model_digest": identity.digest},
        "outputs": outputs,
    }
    if request.id is not None:
        answer["id"] = request.id
    header = orjson.dumps(answer)
    if not pieces:
        return Response(200, header)
    return Response(200, b"".join([header, *pieces]), _BINARY_TYPE, ((_HEADER_LENGTH, str(len(header))),))
