"""V1 requests as multipart forms: `curl -F image=@picture.png`, one part named `image` for each picture."""

import re

from cifar_assets.serving.faults import RequestError, shorten
from cifar_assets.serving.pictures import Pictures, check_count
from cifar_assets.serving.settings import ServingLimits

PART_NAME = "image"

_PARAMETER = re.compile(rb';\s*([!#$%&\'*+.^_`|~0-9A-Za-z-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^;"\s]*))')


def parse_form(content_type: bytes, body: bytes, limits: ServingLimits) -> Pictures:
    """The images of a form, in the order of its parts. Raises RequestError."""
    parts = _split(content_type, body, limits)
    names = [_name(index, head) for index, (head, _) in enumerate(parts)]
    strangers = sorted({name.decode("utf-8", "replace") for name in names if name != PART_NAME.encode()})
    if strangers:
        raise RequestError(PART_NAME, f"only parts named {PART_NAME!r}", f"parts named {shorten(strangers)}")
    if not parts:
        raise RequestError(PART_NAME, f"a part named {PART_NAME!r} holding a picture file", "a form without parts")
    pictures = Pictures(limits)
    for index, (_, content) in enumerate(parts):
        pictures.add_file(f"{PART_NAME}[{index}]", content)
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
        check_count(PART_NAME, num_delimiters - 1, limits)
    if body and not num_delimiters:
        raise _malformed("without its boundary")
    pieces = data.split(delimiter)[1:]
    end = next((index for index, piece in enumerate(pieces) if piece.startswith(b"--")), None)
    if end is None:
        place = f"{PART_NAME}[{len(pieces) - 1}]" if pieces else "body"
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
