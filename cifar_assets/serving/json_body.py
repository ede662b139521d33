"""JSON bodies, checked for size before they are parsed."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import orjson

from cifar_assets.serving.faults import RequestError, shorten
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
        place = f"line {error.lineno} column {error.colno}"
        raise RequestError(
            "body", "a JSON object", f"{len(data)} bytes that are not valid JSON ({error.msg} at {place})"
        ) from error
    if not isinstance(value, dict):
        raise RequestError("body", "a JSON object", kind_of(value))
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


def kind_of(value: object) -> str:
    """A parsed JSON value in words, short enough for an error."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text {shorten(value)}"
    if isinstance(value, (int, float)):
        return f"the number {shorten(value)}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return (
        f"an object with the keys {shorten(sorted(map(str, value)))}" if isinstance(value, dict) else "something else"
    )
