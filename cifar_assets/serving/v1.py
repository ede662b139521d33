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
from cifar_assets.dataset.images import ImageError, check_size, prepare_image
from cifar_assets.serving.faults import RequestError, image_fault, shorten
from cifar_assets.serving.json_body import kind_of, nested_shape, parse_json_object
from cifar_assets.serving.limits import ServingLimits

_SHAPES = ((IMAGE_SIZE, IMAGE_SIZE, 3), IMAGE_SHAPE)
_SHAPE_NAMES = " or ".join(str(list(shape)) for shape in _SHAPES)
_FORMS = 'a base64 string, a data URI, {"b64": ...} or nested lists of numbers'
_WHITESPACE = str.maketrans("", "", " \t\r\n")


def parse_predict(body: bytes, limits: ServingLimits) -> NDArray[np.uint8]:
    """The images of a V1 request, shape (N, 3, 32, 32). One bad instance refuses the whole. Raises RequestError."""
    request = parse_json_object(body, limits)
    if "instances" not in request:
        raise RequestError("instances", "a list of images", f"a body with the keys {shorten(sorted(request))}")
    instances = request["instances"]
    if not isinstance(instances, list):
        raise RequestError("instances", "a list of images", kind_of(instances))
    check_count("instances", len(instances), limits)
    return np.stack([_image(f"instances[{index}]", instance, limits) for index, instance in enumerate(instances)])


def check_count(field: str, num_images: int, limits: ServingLimits) -> None:
    """Refuse a request of no image, or of too many."""
    if num_images == 0:
        raise RequestError(field, "at least one image", "none")
    if num_images > limits.max_images:
        raise RequestError(field, f"at most {limits.max_images} images", str(num_images), status=413)


def decode_file(field: str, data: bytes, limits: ServingLimits) -> NDArray[np.uint8]:
    """A picture file's pixels, with the fault placed at the field."""
    try:
        return prepare_image(data, limits=limits.image)
    except ImageError as error:
        raise image_fault(field, error) from error


def _image(field: str, instance: Any, limits: ServingLimits) -> NDArray[np.uint8]:
    if isinstance(instance, dict) and set(instance) == {"b64"}:
        field, instance = f"{field}.b64", instance["b64"]
        if not isinstance(instance, str):
            raise RequestError(field, "a base64 string", kind_of(instance))
    if isinstance(instance, str):
        return decode_file(field, _decode_text(field, instance, limits), limits)
    if isinstance(instance, list):
        return _array(field, instance)
    raise RequestError(field, _FORMS, kind_of(instance))


def _decode_text(field: str, text: str, limits: ServingLimits) -> bytes:
    if text[:5].lower() == "data:":
        header, comma, text = text.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise RequestError(field, "a data URI of the form data:image/png;base64,...", shorten(header))
    encoded = text.translate(_WHITESPACE)
    try:
        check_size(len(encoded) * 3 // 4 - encoded[-2:].count("="), limits.image)
    except ImageError as error:
        raise image_fault(field, error) from error
    try:
        return base64.b64decode(encoded, validate=True)
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
