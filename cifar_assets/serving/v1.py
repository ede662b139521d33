"""V1 requests and answers: JSON `{"instances": [...]}`, or a multipart form with one part named `image` for each.

A JSON instance is one picture, in one of these forms, which may be mixed:
- a base64 string, or `{"b64": "..."}`: a picture file;
- a data URI, `data:image/png;base64,...`: the same; its bytes decide, not its declared type;
- nested lists of numbers of shape [size, size, 3] (height, width, channel) or [3, size, size], RGB.
  Whole numbers are 0 to 255. Where any number is written with a fraction or exponent, all are 0 to 1.
"""

import base64
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from pydantic import BaseModel

from cifar_assets.contracts import ImageSpec
from cifar_assets.dataset.formats.images import (
    ImageError,
    ImageTooLargeError,
    Picture,
    check_size,
    open_picture,
    picture_pixels,
)
from cifar_assets.serving.answers import (
    Images,
    Logits,
    Query,
    RequestError,
    Response,
    ServedModel,
    json_response,
    shorten,
)
from cifar_assets.serving.classifier import softmax
from cifar_assets.serving.json_body import body_type, check_count, describe, nested_pixels, parse_json
from cifar_assets.serving.settings import ServingLimits

_FORMS = 'a base64 string, a data URI, {"b64": ...} or nested lists of numbers'
_PART = "image"
_FORM_TYPE = b"multipart/form-data"
_BOUNDARY = re.compile(rb'(?i);\s*boundary\s*=\s*(?:"([^"]+)"|([^;"\s]+))')
_NAME = re.compile(rb'(?im)^content-disposition:[^\r\n]*?;\s*name\s*=\s*(?:"([^"\r\n]*)"|([^;"\s]+))')


class _Predict(BaseModel):
    instances: list[Any]


def parse(model: ServedModel, headers: Mapping[bytes, bytes], body: bytes, limits: ServingLimits) -> Query:
    """The images of a request. Raises RequestError."""
    expected = f"application/json, or multipart/form-data with a part named {_PART!r}"
    if body_type(headers, _FORM_TYPE, expected) == _FORM_TYPE:
        return parse_form(model, headers[b"content-type"], body, limits)
    return parse_predict(model, body, limits)


def parse_predict(model: ServedModel, body: bytes, limits: ServingLimits) -> Query:
    """The images of a JSON body. One bad instance refuses the whole. Raises RequestError."""
    channels, height, width = image_shape = model.images.image_shape
    instances = parse_json(_Predict, body, limits.max_json_items(height)).instances
    check_count("instances", len(instances), limits)
    parts: list[tuple[str, bytes | Images]] = []
    for index, instance in enumerate(instances):
        field = f"instances[{index}]"
        if isinstance(instance, dict) and set(instance) == {"b64"}:
            field, instance = f"{field}.b64", instance["b64"]
        if isinstance(instance, str):
            parts.append((field, _decode_base64(field, instance, limits)))
        elif isinstance(instance, list):
            pixels = nested_pixels(field, instance, (height, width, channels), image_shape, fractions=True)
            parts.append((field, pixels if pixels.shape == image_shape else pixels.transpose(2, 0, 1)))
        else:
            raise RequestError(field, _FORMS, describe(instance))
    return _query(model, parts, limits)


def _query(model: ServedModel, parts: Iterable[tuple[str, bytes | Images]], limits: ServingLimits) -> Query:
    """Admit picture files, at their places in the request, by what they cost. Pixels cost nothing more."""
    items: list[tuple[str, Picture | Images]] = []
    num_pixels = 0
    for field, part in parts:
        if isinstance(part, bytes):
            with _image_faults(field):
                part = open_picture(part, limits.image)
            num_pixels += part.width * part.height
            if num_pixels > limits.max_pixels:
                limit = f"at most {limits.max_pixels} pixels in all pictures of a request"
                raise RequestError(field, limit, f"{num_pixels} up to this one", status=413)
        items.append((field, part))
    return Query(num_pixels, partial(_decode, items, model.images), partial(_render, model))


def _decode(items: list[tuple[str, Picture | Images]], form: ImageSpec) -> Images:
    images = []
    for field, item in items:
        with _image_faults(field):
            images.append(picture_pixels(item, form.image_size, form.fit) if isinstance(item, Picture) else item)
    return images[0][np.newaxis] if len(images) == 1 else np.stack(images)


@contextmanager
def _image_faults(field: str) -> Iterator[None]:
    try:
        yield
    except ImageError as error:
        status = 413 if isinstance(error, ImageTooLargeError) else 400
        raise RequestError(field, error.expected, error.received, status=status) from error


def _decode_base64(field: str, text: str, limits: ServingLimits) -> bytes:
    if text[:5].lower() == "data:":
        header, comma, text = text.partition(",")
        if not comma or not header.lower().endswith(";base64"):
            raise RequestError(field, "a data URI of the form data:image/png;base64,...", shorten(header))
    text = "".join(text.split())
    with _image_faults(field):
        check_size(len(text) * 3 // 4 - text[-2:].count("="), limits.image)
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise RequestError(field, _FORMS, f"text that is not base64, {shorten(text)} ({error})") from error


def parse_form(model: ServedModel, content_type: bytes, body: bytes, limits: ServingLimits) -> Query:
    """The images of a form, in the order of its parts. Raises RequestError."""
    boundary = _BOUNDARY.search(content_type)
    if boundary is None:
        received = f"{shorten(content_type.decode('latin-1'))}, which names none"
        raise RequestError("Content-Type", "multipart/form-data with a boundary", received)
    delimiter = b"\r\n--" + (boundary[1] or boundary[2])
    parts = (b"\r\n" + body).split(delimiter, limits.max_images + 2)[1:]
    if not parts or (len(parts) <= limits.max_images + 1 and not parts[-1].startswith(b"--")):
        field = f"{_PART}[{len(parts) - 1}]" if parts else "body"
        raise RequestError(field, "a form that ends with its boundary", f"one cut off after {len(body)} bytes")
    check_count(_PART, len(parts) - 1, limits)
    files: list[tuple[str, bytes]] = []
    for index, part in enumerate(parts[:-1]):
        head, _, content = part.partition(b"\r\n\r\n")
        found = _NAME.search(head)
        name = (found[1] or found[2] or b"").decode("latin-1") if found else ""
        if name != _PART:
            received = f"part {index + 1} with the name {shorten(name)}"
            raise RequestError(_PART, f"only parts named {_PART!r}", received)
        files.append((f"{_PART}[{index}]", content))
    return _query(model, files, limits)


def _render(model: ServedModel, logits: Logits) -> Response:
    """Class, confidence and all probabilities for each image, and which model said so."""
    found, classes = [], model.images.classes
    for row in softmax(logits).tolist():
        confidence = max(row)
        named = dict(zip(classes, row, strict=True))
        found.append({"class": classes[row.index(confidence)], "confidence": confidence, "probabilities": named})
    identity = {"model_name": model.name, "model_version": model.version, "model_digest": model.digest}
    return json_response({"predictions": found, **identity})
