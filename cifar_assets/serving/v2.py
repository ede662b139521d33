"""V2 (open inference protocol) requests and answers, in JSON and with the binary data extension.

One input, `images`: UINT8, shape [N, 3, 32, 32], RGB pixels. Two outputs, `probabilities` and `logits`: FP32, [N, 10].
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from cifar_assets.contracts import CLASSES, IMAGE_SHAPE, MODEL_INPUT
from cifar_assets.serving.answers import ModelIdentity, RequestError, Response, shorten, softmax
from cifar_assets.serving.json_body import check_count, kind_of, nested_shape, parse_json_object, typed, whole_pixels
from cifar_assets.serving.settings import ServingLimits

HEADER_LENGTH = b"inference-header-content-length"
DATATYPE = "UINT8"
OUTPUT_NAMES = ("probabilities", "logits")
INPUT_METADATA = {"name": MODEL_INPUT, "datatype": DATATYPE, "shape": [-1, *IMAGE_SHAPE]}
OUTPUT_METADATA = [{"name": name, "datatype": "FP32", "shape": [-1, len(CLASSES)]} for name in OUTPUT_NAMES]

_MAX_ID_CHARACTERS = 1024
_PIXELS = int(np.prod(IMAGE_SHAPE))
_SHAPE_NAME = f"[N, {', '.join(map(str, IMAGE_SHAPE))}]"


@dataclass(frozen=True)
class InferRequest:
    """What is asked: images of shape (N, 3, 32, 32), and which outputs in which form."""

    images: NDArray[np.uint8]
    id: str | None
    outputs: Mapping[str, bool]
    """Names of the outputs wanted, in order; True where the answer carries it as binary data."""


def parse_infer(body: bytes, header_length: bytes | None, limits: ServingLimits) -> InferRequest:
    """Check a request against what the metadata promises. Raises RequestError.

    Nothing is allocated by a claimed size.
    """
    view = memoryview(body)
    num_json_bytes = len(body) if header_length is None else _header_length(header_length, len(body))
    request = parse_json_object(view[:num_json_bytes], limits)
    images = _images(_single_input(request), view[num_json_bytes:], limits, binary=header_length is not None)
    request_id = request.get("id")
    if request_id is not None and not (isinstance(request_id, str) and len(request_id) <= _MAX_ID_CHARACTERS):
        raise RequestError("id", f"a text of at most {_MAX_ID_CHARACTERS} characters", kind_of(request_id))
    return InferRequest(images, request_id, _outputs(request))


def render_infer(request: InferRequest, logits: NDArray[np.float32], identity: ModelIdentity) -> Response:
    """The answer to a request, whose images gave these logits of shape (N, 10)."""
    values = {"logits": logits.astype("<f4"), "probabilities": softmax(logits).astype("<f4")}
    outputs: list[dict[str, Any]] = []
    pieces: list[bytes] = []
    for name, binary in request.outputs.items():
        array = values[name]
        output: dict[str, Any] = {"name": name, "datatype": "FP32", "shape": list(array.shape)}
        if binary:
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
    length = ("Inference-Header-Content-Length", str(len(header)))
    return Response(200, b"".join([header, *pieces]), "application/octet-stream", (length,))


def _header_length(value: bytes, num_body_bytes: int) -> int:
    if not (value.isdigit() and len(value) <= 12) or int(value) > num_body_bytes:
        expected = f"a number of bytes up to the body's {num_body_bytes}"
        raise RequestError("Inference-Header-Content-Length", expected, shorten(value.decode("latin-1")))
    return int(value)


def _single_input(request: dict[str, Any]) -> dict[str, Any]:
    inputs = request.get("inputs")
    if not isinstance(inputs, list) or not inputs:
        received = kind_of(inputs) if "inputs" in request else f"a body with the keys {shorten(sorted(request))}"
        raise RequestError("inputs", f"a list with the one input {MODEL_INPUT!r}", received)
    for index, tensor in enumerate(inputs):
        typed(dict, tensor, f"inputs[{index}]", "an object with name, shape, datatype and data")
        if tensor.get("name") != MODEL_INPUT:
            raise RequestError(f"inputs[{index}].name", repr(MODEL_INPUT), kind_of(tensor.get("name")))
    if len(inputs) > 1:
        raise RequestError("inputs", f"the one input {MODEL_INPUT!r}", f"it {len(inputs)} times")
    return inputs[0]


def _images(
    tensor: dict[str, Any], binary_part: memoryview, limits: ServingLimits, *, binary: bool
) -> NDArray[np.uint8]:
    datatype = tensor.get("datatype")
    if datatype != DATATYPE:
        raise RequestError(f"inputs[0].datatype of {MODEL_INPUT!r}", repr(DATATYPE), kind_of(datatype))
    field = f"inputs[0].shape of {MODEL_INPUT!r}"
    shape = typed(list, tensor.get("shape"), field, _SHAPE_NAME)
    is_positive = [type(size) is int and size > 0 for size in shape]
    if not all(is_positive) or len(shape) != 1 + len(IMAGE_SHAPE) or tuple(shape[1:]) != IMAGE_SHAPE:
        raise RequestError(field, f"{_SHAPE_NAME} with N of at least 1", shorten(shape))
    check_count(field, shape[0], limits)
    size = _parameters("inputs[0].parameters", tensor).get("binary_data_size")
    if size is not None:
        return _binary_numbers(tensor, size, shape[0] * _PIXELS, binary_part, binary=binary).reshape(shape)
    if len(binary_part):
        expected = f"{shape[0] * _PIXELS}, for the bytes after the JSON"
        raise RequestError("inputs[0].parameters.binary_data_size", expected, "none")
    return _json_numbers(tensor, tuple(shape)).reshape(shape)


def _binary_numbers(
    tensor: dict[str, Any], size: Any, num_expected: int, binary_part: memoryview, *, binary: bool
) -> NDArray[np.uint8]:
    field = f"inputs[0].parameters.binary_data_size of {MODEL_INPUT!r}"
    if not binary:
        raise RequestError("Inference-Header-Content-Length", "the header that goes with binary_data_size", "none")
    if tensor.get("data") is not None:
        raise RequestError("inputs[0].data", "no data where binary_data_size is given", kind_of(tensor["data"]))
    if type(size) is not int or size != num_expected:
        raise RequestError(field, f"{num_expected} bytes, the product of the shape", kind_of(size))
    if len(binary_part) != num_expected:
        raise RequestError(field, f"{num_expected} bytes after the JSON", f"{len(binary_part)} bytes")
    return np.frombuffer(binary_part, dtype=np.uint8)


def _json_numbers(tensor: dict[str, Any], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    field = f"inputs[0].data of {MODEL_INPUT!r}"
    num_expected = shape[0] * _PIXELS
    data = typed(list, tensor.get("data"), field, f"a list of {num_expected} numbers, flat or nested")
    expected = f"{num_expected} numbers, flat or nested as the shape says"
    found = nested_shape(field, data, expected, max_depth=len(shape))
    if found == shape:
        for _ in IMAGE_SHAPE:
            data = list(chain.from_iterable(data))
    elif found != (num_expected,):
        raise RequestError(field, expected, f"shape {list(found)}")
    if set(map(type, data)) != {int}:
        stranger = next(value for value in data if type(value) is not int)
        raise RequestError(field, f"whole numbers, for {DATATYPE}", kind_of(stranger))
    return whole_pixels(field, data)


def _outputs(request: dict[str, Any]) -> dict[str, bool]:
    default = _flag("parameters.binary_data_output", _parameters("parameters", request), default=False)
    wanted = request.get("outputs")
    if wanted is None or wanted == []:
        return dict.fromkeys(OUTPUT_NAMES, default)
    outputs: dict[str, bool] = {}
    for index, output in enumerate(typed(list, wanted, "outputs", "a list")):
        field = f"outputs[{index}]"
        name = output.get("name") if isinstance(output, dict) else output
        if not isinstance(output, dict) or name not in OUTPUT_NAMES:
            raise RequestError(f"{field}.name", f"one of {list(OUTPUT_NAMES)}", kind_of(name))
        own = _parameters(f"{field}.parameters", output)
        outputs[name] = _flag(f"{field}.parameters.binary_data", own, default=default)
    return outputs


def _parameters(field: str, parent: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a request, input or output; null is the same as absent."""
    parameters = parent.get("parameters")
    return {} if parameters is None else typed(dict, parameters, field, "an object")


def _flag(field: str, parameters: dict[str, Any], *, default: bool) -> bool:
    value = parameters.get(field.rpartition(".")[2])
    return default if value is None else typed(bool, value, field, "true or false")
