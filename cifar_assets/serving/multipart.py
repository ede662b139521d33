"""V1 requests as multipart forms: `curl -F image=@picture.png`, one part named `image` per picture."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from cifar_assets.dataset.images import ImageError, check_size
from cifar_assets.serving.faults import RequestError, image_fault, shorten
from cifar_assets.serving.limits import ServingLimits
from cifar_assets.serving.v1 import check_count, decode_file

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks  # the library defines it for type checkers only

PART_NAME = "image"


def parse_form(content_type: str, body: bytes, limits: ServingLimits) -> NDArray[np.uint8]:
    """The images of a form in the order of its parts, shape (N, 3, 32, 32). Raises RequestError."""
    parts = _Parts(limits)
    parts.read(_boundary(content_type), body)
    strangers = [name for name in parts.names if name != PART_NAME]
    if strangers:
        raise RequestError(
            PART_NAME, f"only parts named {PART_NAME!r}", f"parts named {shorten(sorted(set(strangers)))}"
        )
    if not parts.contents:
        raise RequestError(PART_NAME, f"a part named {PART_NAME!r} holding a picture file", "a form without parts")
    return np.stack(
        [decode_file(f"{PART_NAME}[{index}]", bytes(data), limits) for index, data in enumerate(parts.contents)]
    )


def _boundary(content_type: str) -> bytes:
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise RequestError(
            "Content-Type", "multipart/form-data with a boundary", f"{shorten(content_type)}, which names none"
        )
    return boundary


class _Parts:
    """Names and contents of a form's parts, refused as soon as one is over a limit."""

    def __init__(self, limits: ServingLimits):
        self.names: list[str] = []
        self.contents: list[bytearray] = []
        self._limits = limits
        self._header = bytearray()
        self._value = bytearray()
        self._disposition = b""
        self._complete = False

    def read(self, boundary: bytes, body: bytes) -> None:
        callbacks: MultipartCallbacks = {
            "on_part_begin": self._on_part_begin,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_headers_finished": self._on_headers_finished,
            "on_part_data": self._on_part_data,
            "on_end": self._on_end,
        }
        try:
            parser = MultipartParser(boundary, callbacks)
            parser.write(body)
            parser.finalize()
        except FormParserError as error:
            raise RequestError("body", "a multipart form", f"one that is malformed ({error})") from error
        if not self._complete:
            place = f"{PART_NAME}[{len(self.contents) - 1}]" if self.contents else "body"
            raise RequestError(place, "a form that ends with its boundary", f"one cut off after {len(body)} bytes")

    def _on_part_begin(self) -> None:
        check_count(PART_NAME, len(self.contents) + 1, self._limits)
        self.contents.append(bytearray())
        self._disposition = b""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _on_headers_finished(self) -> None:
        name = parse_options_header(self._disposition)[1].get(b"name")
        if name is None:
            raise RequestError(
                f"part {len(self.contents)}", "a Content-Disposition header with a name", shorten(self._disposition)
            )
        self.names.append(name.decode("utf-8", "replace"))

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        content = self.contents[-1]
        try:
            check_size(len(content) + end - start, self._limits.image)
        except ImageError as error:
            raise image_fault(f"{PART_NAME}[{len(self.contents) - 1}]", error) from error
        content += data[start:end]

    def _on_end(self) -> None:
        self._complete = True
