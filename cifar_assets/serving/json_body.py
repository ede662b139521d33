"""JSON bodies, checked for size before they are parsed, and for type where they are read."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from cifar_assets.serving.answers import RequestError, shorten
from cifar_assets.serving.settings import ServingLimits


def parse_json_object(body: bytes | memoryview, limits: ServingLimits) -> dict[str, Any]:
    """The JSON object in a body. Raises RequestError."""
    data = bytes(body)
    if not data.strip():
        raise RequestError("body", "a JSON object", "an empty body")
    num_items = data.count(b",") + data.count(b"[") + data.count(b"{")
    if num_items > limits.max_json_items:
        raise RequestError("body", f"at most {limits.max_json_items} JSON values", f"about {num_items}", status=413)
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        place = f"{error.msg} at line {error.lineno} column {error.colno}"
        received = f"{len(data)} bytes that are not valid JSON ({place})"
        raise RequestError("body", "a JSON object", received) from error
    return typed(dict, value, "body", "a JSON object")


def typed(kind: type, value: Any, field: str, expected: str) -> Any:
    """The value, refused with RequestError where its type is not that of `kind`."""
    if type(value) is not kind:
        raise RequestError(field, expected, kind_of(value))
    return value


def nested_shape(field: str, value: list[Any], expected: str, *, max_depth: int) -> tuple[int, ...]:
    """The shape of nested lists, refusing ragged and too deep ones with RequestError."""
    shape: list[int] = []
    level: Sequence[Any] = [value]
    while level and len(shape) <= max_depth:
        lengths = {len(item) if isinstance(item, list) else None for item in level}
        if lengths == {None}:
            return tuple(shape)
        if len(lengths) > 1:
            numbers = ["single values"] if None in lengths else []
            lists = [f"lists of {length}" for length in sorted(length for length in lengths if length is not None)]
            raise RequestError(field, expected, f"a ragged one: {shorten(' and '.join(numbers + lists))} on one level")
        shape.append(lengths.pop() or 0)
        level = list(chain.from_iterable(level))
    if level:
        raise RequestError(field, expected, f"lists nested deeper than {max_depth} levels")
    return tuple(shape)


def whole_pixels(field: str, numbers: list[int]) -> NDArray[np.uint8]:
    """JSON whole numbers as pixel values, refusing what no byte holds."""
    low, high = min(numbers), max(numbers)
    if low < 0 or high > 255:
        raise RequestError(field, "whole numbers from 0 to 255", f"values from {shorten(low)} to {shorten(high)}")
    return np.array(numbers, dtype=np.uint8)


def check_count(field: str, num_images: int, limits: ServingLimits) -> None:
    """Refuse a request without an image, or with too many."""
    if num_images == 0:
        raise RequestError(field, "at least one image", "none")
    if num_images > limits.max_images:
        raise RequestError(field, f"at most {limits.max_images} images", str(num_images), status=413)


def kind_of(value: object) -> str:
    """A parsed JSON value in words, short enough for an error."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str():
            return f"the text {shorten(value)}"
        case int() | float():
            return f"the number {shorten(value)}"
        case list():
            return f"a list of {len(value)}"
        case dict():
            return f"an object with the keys {shorten(sorted(map(str, value)))}"
        case _:
            return "something else"
