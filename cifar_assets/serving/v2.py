"""V2 (open inference protocol) requests and answers, in JSON and with the binary data extension.

One input, `images`: UINT8, [N, 3, size, size], RGB. Two outputs, `probabilities` and `logits`: FP32, [N, classes].
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import numpy as np
import orjson
from pydantic import BaseModel, Field

from cifar_assets.contracts import MODEL_INPUT, ImageSpec
from cifar_assets.serving.answers import (
    Images,
    Logits,
    Query,
    RequestError,
    Response,
    ServedModel,
    shorten,
)
from cifar_assets.serving.classifier import softmax
from cifar_assets.serving.json_body import body_type, check_count, describe, nested_pixels, parse_json
from cifar_assets.serving.settings import ServingLimits

_HEADER_LENGTH = "Inference-Header-Content-Length"
_BINARY_TYPE = "application/octet-stream"
OUTPUT_NAMES = ("probabilities", "logits")


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


def tensors(images: ImageSpec) -> dict[str, list[dict[str, Any]]]:
    """The model's inputs and outputs, as its metadata describes them."""
    inputs = [{"name": MODEL_INPUT, "datatype": "UINT8", "shape": [-1, *images.image_shape]}]
    outputs = [{"name": name, "datatype": "FP32", "shape": [-1, len(images.classes)]} for name in OUTPUT_NAMES]
    return {"inputs": inputs, "outputs": outputs}


def parse(model: ServedModel, headers: Mapping[bytes, bytes], body: bytes, limits: ServingLimits) -> Query:
    """Check a request against what the metadata promises. Raises RequestError.

    Allocates nothing based on a declared size.
    """
    body_type(headers, _BINARY_TYPE.encode(), f"application/json or {_BINARY_TYPE}")
    json_size = headers.get(_HEADER_LENGTH.lower().encode())
    num_json_bytes = len(body)
    if json_size is not None:
        if not (json_size.isdigit() and len(json_size) <= 12) or int(json_size) > len(body):
            raise RequestError(_HEADER_LENGTH, f"a number of bytes up to the body's {len(body)}", shorten(json_size))
        num_json_bytes = int(json_size)
    request = parse_json(_Infer, body[:num_json_bytes], limits.max_json_items(model.images.image_size))
    if len(request.inputs) != 1:
        raise RequestError("inputs", f"a list of the one input {MODEL_INPUT!r}", describe(request.inputs))
    binary = None if json_size is None else body[num_json_bytes:]
    images = _images(request.inputs[0], binary, model.images.image_shape, limits)
    return Query(0, lambda: images, partial(_render, model, request))


def _images(tensor: _Input, binary: bytes | None, image_shape: tuple[int, ...], limits: ServingLimits) -> Images:
    num_images, *shape = tensor.shape or [0]
    if tuple(shape) != image_shape or num_images < 1:
        expected = f"[N, {', '.join(map(str, image_shape))}] with N of at least 1"
        raise RequestError("inputs[0].shape", expected, shorten(tensor.shape))
    check_count("inputs[0].shape", num_images, limits)
    num_numbers = num_images * int(np.prod(image_shape))
    if binary and tensor.data is not None:
        raise RequestError("inputs[0].data", "no data in JSON when binary data follows", describe(tensor.data))
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


def _render(model: ServedModel, request: _Infer, logits: Logits) -> Response:
    """The answer to a request, whose images gave these logits."""
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
        "model_name": model.name,
        "model_version": model.version,
        "parameters": {"model_digest": model.digest},
        "outputs": outputs,
    }
    if request.id is not None:
        answer["id"] = request.id
    header = orjson.dumps(answer)
    if not pieces:
        return Response(200, header)
    return Response(200, b"".join([header, *pieces]), _BINARY_TYPE, ((_HEADER_LENGTH, str(len(header))),))
