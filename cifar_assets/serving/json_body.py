"""JSON bodies: checked for size before parsing, then validated against a pydantic model."""

import re
from collections.abc import Mapping
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import orjson
from pydantic import BaseModel, ValidationError

from cifar_assets.serving.answers import Images, RequestError, shorten
from cifar_assets.serving.settings import ServingLimits

_WORDING = re.compile(r"^\w+ should (be|have) | or instance of \w+| after validation, not \d+$")
"""The parts of pydantic's messages around the expected value."""
_JSON_TYPES = (b"", b"application/json", b"text/plain", b"application/x-www-form-urlencoded")
"""Content types that are read as JSON, including the one that curl sends for `-d` and a missing one."""
T = TypeVar("T", bound=BaseModel)


def body_type(headers: Mapping[bytes, bytes], other_type: bytes, expected: str) -> bytes:
    """The content type of a body; refused if it is neither JSON nor the other type."""
    declared = headers.get(b"content-type", b"")
    found = declared.partition(b";")[0].strip().lower()
    if found not in _JSON_TYPES and found != other_type:
        raise RequestError("Content-Type", expected, shorten(declared.decode("latin-1")), status=415)
    return found


def parse_json(kind: type[T], body: bytes, max_items: int) -> T:
    """The body as a model of that kind. Raises RequestError with the place of the first fault."""
    num_items = body.count(b",") + body.count(b"[") + body.count(b"{")
    if num_items > max_items:
        raise RequestError("body", f"at most {max_items} JSON values", f"about {num_items}", status=413)
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        received = f"{len(body)} bytes that are not valid JSON ({error.msg} at line {error.lineno})"
        raise RequestError("body", "a JSON object", received) from error
    if not isinstance(value, dict):
        raise RequestError("body", "a JSON object", describe(value))
    try:
        return kind.model_validate(value, strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in fault["loc"])[1:]
        expected = "a value" if fault["type"] == "missing" else _WORDING.sub("", fault["msg"])
        raise RequestError(field, expected, describe(fault["input"])) from error


def nested_pixels(field: str, value: list[Any], *shapes: tuple[int, ...], fractions: bool) -> Images:
    """Pixels from nested lists of one of the shapes: integers unchanged, fractions from 0 to 1 multiplied by 255.

    With `fractions`, a single fractional number makes all of them fractions. Raises RequestError.
    """
    expected = f"an array of shape {' or '.join(str(list(shape)) for shape in shapes)}"
    first, shape = value, ()
    while isinstance(first, list) and len(shape) < 6:
        shape = (*shape, len(first))
        first = first[0] if first else None
    if shape not in shapes:
        raise RequestError(field, expected, f"shape {list(shape)}")
    numbers: list[Any] = [value]
    for size in shape:
        if any(type(item) is not list or len(item) != size for item in numbers):
            raise RequestError(field, expected, "a ragged array with lists of different lengths")
        numbers = list(chain.from_iterable(numbers))
    allowed = (int, float) if fractions else (int,)
    kinds = set(map(type, numbers))
    if not kinds.issubset(allowed):
        other = next(number for number in numbers if type(number) not in allowed)
        raise RequestError(field, "numbers" if fractions else "whole numbers", describe(other))
    low, high = min(numbers), max(numbers)
    if low < 0 or high > (1 if float in kinds else 255):
        expected = "numbers from 0 to 1 where any has a fraction" if float in kinds else "whole numbers from 0 to 255"
        raise RequestError(field, expected, f"values from {shorten(low)} to {shorten(high)}")
    pixels = np.rint(np.array(numbers) * 255) if float in kinds else np.array(numbers)
    return pixels.astype(np.uint8).reshape(shape)


def check_count(field: str, num_images: int, limits: ServingLimits) -> None:
    """Refuse a request without an image, or with too many."""
    if num_images == 0:
        raise RequestError(field, "at least one image", "none")
    if num_images > limits.max_images:
        raise RequestError(field, f"at most {limits.max_images} images", str(num_images), status=413)


def describe(value: object) -> str:
    """A short description of a parsed JSON value, for errors."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object with the keys {shorten(sorted(value))}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return shorten(value)
