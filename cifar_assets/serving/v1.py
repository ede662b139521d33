"""V1 requests: JSON `{"instances": [...]}` to images.

An instance is one picture, in one of these forms, which may be mixed:
- a base64 string, or `{"b64": "..."}`: a picture file;
- a data URI, `data:image/png;base64,...`: the same; its bytes decide, not its declared type;
- nested lists of numbers of shape [32, 32, 3] (height, width, channel) or [3, 32, 32] (channel, height, width), RGB.
  Whole numbers are 0 to 255. Where any number is written with a fraction or exponent, all are 0 to 1.
"""

import base64
import binascii
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifar_assets.contracts import IMAGE_SHAPE, IMAGE_SIZE
from cifar_assets.serving.faults import RequestError, shorten
from cifar_assets.serving.json_body import kind_of, nested_shape, parse_json_object
from cifar_assets.serving.pictures import Pictures, check_count
from cifar_assets.serving.settings import ServingLimits

_SHAPES = ((IMAGE_SIZE, IMAGE_SIZE, 3), IMAGE_SHAPE)
_SHAPE_NAMES = " or ".join(str(list(shape)) for shape in _SHAPES)
_FORMS = 'a base64 string, a data URI, {"b64": ...} or nested lists of numbers'
_WHITESPACE = str.maketrans("", "", " \t\r\n")


def parse_predict(body: bytes, limits: ServingLimits) -> Pictures:
    """The images of a V1 request. One bad instance refuses the whole. Raises RequestError."""
    request = parse_json_object(body, limits)
    instances = request.get("instances")
    if "instances" not in request:
        raise RequestError("instances", "a list of images", f"a body with the keys {shorten(sorted(request))}")
    if not isinstance(instances, list):
        raise RequestError("instances", "a list of images", kind_of(instances))
    check_count("instances", len(instances), limits)
    pictures = Pictures(limits)
    for index, instance in enumerate(instances):
        _add(pictures, f"instances[{index}]", instance)
    return pictures


def _add(pictures: Pictures, field: str, instance: Any) -> None:
    if isinstance(instance, dict) and set(instance) == {"b64"}:
        field, instance = f"{field}.b64", instance["b64"]
        if not isinstance(instance, str):
            raise RequestError(field, "a base64 string", kind_of(instance))
    if isinstance(instance, str):
        encoded = _base64_text(field, instance)
        pictures.check_file_size(field, len(encoded) * 3 // 4 - encoded[-2:].count("="))
        pictures.add_file(field, _decode_base64(field, encoded))
    elif isinstance(instance, list):
        pictures.add_pixels(field, _array(field, instance))
    else:
        raise RequestError(field, _FORMS, kind_of(instance))


def _base64_text(field: str, text: str) -> str:
    if text[:5].lower() == "data:":
        header, comma, text = text.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise RequestError(field, "a data URI of the form data:image/png;base64,...", shorten(header))
    return text.translate(_WHITESPACE)


def _decode_base64(field: str, text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(field, _FORMS, f"text that is not base64, {shorten(text)} ({error})") from error


def _array(field: str, instance: list[Any]) -> NDArray[np.uint8]:
    expected = f"an array of shape {_SHAPE_NAMES}"
    shape = nested_shape(field, instance, expected, max_depth=3)
    if shape not in _SHAPES:
        raise RequestError(field, expected, f"shape {list(shape)}")
    numbers = list(chain.from_iterable(chain.from_iterable(instance)))
    pixels = _pixels(field, numbers).reshape(shape)
    return pixels if shape == IMAGE_SHAPE else pixels.transpose(2, 0, 1)


def _pixels(field: str, numbers: list[Any]) -> NDArray[np.uint8]:
    """Flat JSON numbers as pixel values: whole numbers as they are, fractions from 0 to 1 scaled to 255."""
    kinds = set(map(type, numbers))
    if kinds - {int, float}:
        stranger = next(value for value in numbers if type(value) not in (int, float))
        raise RequestError(field, "numbers", kind_of(stranger))
    if float not in kinds:
        return whole_pixels(field, numbers)
    low, high = min(numbers), max(numbers)
    if not (low >= 0 and high <= 1):
        raise RequestError(
            field,
            "numbers from 0 to 1 where any has a fraction (whole numbers may be 0 to 255)",
            f"values from {shorten(low)} to {shorten(high)}",
        )
    return np.rint(np.array(numbers, dtype=np.float64) * 255).astype(np.uint8)


def whole_pixels(field: str, numbers: list[int]) -> NDArray[np.uint8]:
    """JSON whole numbers as pixel values, refusing what no byte holds."""
    low, high = min(numbers), max(numbers)
    if low < 0 or high > 255:
        raise RequestError(field, "whole numbers from 0 to 255", f"values from {shorten(low)} to {shorten(high)}")
    return np.array(numbers, dtype=np.uint8)
