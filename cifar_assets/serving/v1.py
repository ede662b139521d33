"""V1 requests to pictures: JSON `{"instances": [...]}`, or a multipart form with one part named `image` for each.

A JSON instance is one picture, in one of these forms, which may be mixed:
- a base64 string, or `{"b64": "..."}`: a picture file;
- a data URI, `data:image/png;base64,...`: the same; its bytes decide, not its declared type;
- nested lists of numbers of shape [32, 32, 3] (height, width, channel) or [3, 32, 32] (channel, height, width), RGB.
  Whole numbers are 0 to 255. Where any number is written with a fraction or exponent, all are 0 to 1.
"""

import base64
import binascii
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifar_assets.contracts import IMAGE_SHAPE, IMAGE_SIZE
from cifar_assets.dataset.formats.images import (
    ImageError,
    ImageTooLargeError,
    Picture,
    check_size,
    open_picture,
    picture_pixels,
)
from cifar_assets.serving.answers import RequestError, shorten
from cifar_assets.serving.json_body import check_count, kind_of, nested_shape, parse_json_object, typed, whole_pixels
from cifar_assets.serving.settings import ServingLimits

_SHAPES = ((IMAGE_SIZE, IMAGE_SIZE, 3), IMAGE_SHAPE)
_SHAPE_NAMES = " or ".join(str(list(shape)) for shape in _SHAPES)
_FORMS = 'a base64 string, a data URI, {"b64": ...} or nested lists of numbers'
_WHITESPACE = str.maketrans("", "", " \t\r\n")
_PART_NAME = "image"
_PARAMETER = re.compile(rb';\s*([!#$%&\'*+.^_`|~0-9A-Za-z-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^;"\s]*))')


class Pictures:
    """The pictures of a request in order, pixels or files still to be decoded, whose cost is known before that."""

    def __init__(self, limits: ServingLimits):
        self.num_pixels = 0
        """Of the files; what decoding them costs."""
        self._limits = limits
        self._items: list[tuple[str, NDArray[np.uint8] | Picture]] = []

    def add_pixels(self, field: str, pixels: NDArray[np.uint8]) -> None:
        """Add pixels of shape (3, 32, 32)."""
        self._items.append((field, pixels))

    def add_file(self, field: str, data: bytes) -> None:
        """Add a picture file. RequestError for one that is not admitted, or with which the request costs too much."""
        with _image_faults(field):
            picture = open_picture(data, self._limits.image)
        self.num_pixels += picture.width * picture.height
        if self.num_pixels > self._limits.max_pixels:
            limit = f"at most {self._limits.max_pixels} pixels in all pictures of a request"
            raise RequestError(field, limit, f"{self.num_pixels} up to this one", status=413)
        self._items.append((field, picture))

    def check_file_size(self, field: str, num_bytes: int) -> None:
        """Refuse a file that will be too long, for callers that know the length before the bytes."""
        with _image_faults(field):
            check_size(num_bytes, self._limits.image)

    def decode(self) -> NDArray[np.uint8]:
        """All images, shape (N, 3, 32, 32). RequestError for a file that cannot be decoded."""
        images = []
        for field, item in self._items:
            with _image_faults(field):
                images.append(picture_pixels(item) if isinstance(item, Picture) else item)
        return images[0][np.newaxis] if len(images) == 1 else np.stack(images)


@contextmanager
def _image_faults(field: str) -> Iterator[None]:
    try:
        yield
    except ImageError as error:
        status = 413 if isinstance(error, ImageTooLargeError) else 400
        raise RequestError(field, error.expected, error.received, status=status) from error


def parse_predict(body: bytes, limits: ServingLimits) -> Pictures:
    """The images of a V1 request. One bad instance refuses the whole. Raises RequestError."""
    request = parse_json_object(body, limits)
    if "instances" not in request:
        raise RequestError("instances", "a list of images", f"a body with the keys {shorten(sorted(request))}")
    instances = typed(list, request["instances"], "instances", "a list of images")
    check_count("instances", len(instances), limits)
    pictures = Pictures(limits)
    for index, instance in enumerate(instances):
        _add(pictures, f"instances[{index}]", instance)
    return pictures


def _add(pictures: Pictures, field: str, instance: Any) -> None:
    if isinstance(instance, dict) and set(instance) == {"b64"}:
        field = f"{field}.b64"
        instance = typed(str, instance["b64"], field, "a base64 string")
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


def parse_form(content_type: bytes, body: bytes, limits: ServingLimits) -> Pictures:
    """The images of a form, in the order of its parts. Raises RequestError."""
    parts = _split(content_type, body, limits)
    names = [_name(index, head) for index, (head, _) in enumerate(parts)]
    strangers = sorted({name.decode("utf-8", "replace") for name in names if name != _PART_NAME.encode()})
    if strangers:
        raise RequestError(_PART_NAME, f"only parts named {_PART_NAME!r}", f"parts named {shorten(strangers)}")
    if not parts:
        raise RequestError(_PART_NAME, f"a part named {_PART_NAME!r} holding a picture file", "a form without parts")
    pictures = Pictures(limits)
    for index, (_, content) in enumerate(parts):
        pictures.add_file(f"{_PART_NAME}[{index}]", content)
    return pictures


def _split(content_type: bytes, body: bytes, limits: ServingLimits) -> list[tuple[bytes, bytes]]:
    """Headers and content of each part. The parts are counted before they are cut out."""
    boundary = _parameter(content_type, b"boundary")
    if not boundary:
        received = f"{shorten(content_type.decode('latin-1'))}, which names none"
        raise RequestError("Content-Type", "multipart/form-data with a boundary", received)
    delimiter = b"\r\n--" + boundary
    data = b"\r\n" + body
    num_delimiters = data.count(delimiter)
    if num_delimiters > limits.max_images + 1:
        check_count(_PART_NAME, num_delimiters - 1, limits)
    if body and not num_delimiters:
        raise _malformed("without its boundary")
    pieces = data.split(delimiter)[1:]
    end = next((index for index, piece in enumerate(pieces) if piece.startswith(b"--")), None)
    if end is None:
        place = f"{_PART_NAME}[{len(pieces) - 1}]" if pieces else "body"
        raise RequestError(place, "a form that ends with its boundary", f"one cut off after {len(body)} bytes")
    parts = []
    for piece in pieces[:end]:
        head, separator, content = piece.partition(b"\r\n\r\n")
        lines = head.split(b"\r\n")
        if not separator or lines[0].strip(b" \t") or not all(b":" in line for line in lines[1:]):
            raise _malformed("with a part that has no headers")
        parts.append((head, content))
    return parts


def _name(index: int, head: bytes) -> bytes:
    disposition = b""
    for line in head.split(b"\r\n"):
        field, _, value = line.partition(b":")
        if field.strip().lower() == b"content-disposition":
            disposition = value.strip()
    name = _parameter(disposition, b"name")
    if name is None:
        expected = "a Content-Disposition header with a name"
        raise RequestError(f"part {index + 1}", expected, shorten(disposition.decode("latin-1")))
    return name


def _parameter(value: bytes, name: bytes) -> bytes | None:
    """A parameter of a header's value, such as `name` of `form-data; name="image"; filename="a;b.png"`."""
    for match in _PARAMETER.finditer(value):
        if match[1].lower() == name:
            return match[3] if match[2] is None else re.sub(rb"\\(.)", rb"\1", match[2])
    return None


def _malformed(how: str) -> RequestError:
    return RequestError("body", "a multipart form", f"one that is malformed, {how}")
