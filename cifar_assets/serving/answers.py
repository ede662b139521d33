"""Requests, responses, and the mapping from errors to responses."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from cifar_assets.contracts import ImageSpec
from resources.errors import ExplainedError

_log = logging.getLogger(__name__)

Headers = tuple[tuple[str, str], ...]
Images = NDArray[np.uint8]
Logits = NDArray[np.float32]


class RequestError(ExplainedError):
    """A request is invalid. `field` names the part at fault: `instances[2]`, `image[0]`, `inputs[0].shape`."""

    def __init__(self, field: str, expected: str, received: str, *, status: int = 400, headers: Headers = ()):
        super().__init__(f"{field}: expected {expected}, got {received}.")
        self.field = field
        self.expected = expected
        self.received = received
        self.status = status
        self.headers = headers


class BusyError(RequestError):
    """The server is full. The client should try again a second later."""

    def __init__(self, limit: str, received: object):
        super().__init__("server", limit, str(received), status=429, headers=(("Retry-After", "1"),))


class GoneError(RequestError):
    """The client no longer waits for the answer."""

    def __init__(self) -> None:
        super().__init__("connection", "a client that waits for its answer", "one that has disconnected")


@dataclass(frozen=True)
class Response:
    """An answer, complete except for what the connection adds."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: Headers = ()


@dataclass(frozen=True)
class ServedModel:
    """Name in addresses and answers, version for people, digests for decisions, and the images and classes."""

    name: str
    version: str
    digest: str
    dataset_digest: str
    images: ImageSpec
    properties: Mapping[str, str] = field(default_factory=dict)
    """Further facts for the model's metadata."""


@dataclass(frozen=True)
class Query:
    """A request that has been read: how its images are decoded, which costs `num_pixels`, and its answer written."""

    num_pixels: int
    images: Callable[[], Images]
    render: Callable[[Logits], Response]


def json_response(value: Any, status: int = 200, headers: Headers = ()) -> Response:
    """A JSON answer."""
    return Response(status, orjson.dumps(value), headers=headers)


def error_response(error: BaseException) -> Response:
    """The answer to a request that failed with this error: either what is wrong with the request, or a server error."""
    if not isinstance(error, RequestError):
        _log.error("A request failed", exc_info=error)
        return json_response({"error": "The server failed on this request; see its log."}, 500)
    if error.status == 500:
        _log.error("%s", error)
    body = {"error": str(error), "field": error.field, "expected": error.expected, "received": error.received}
    return json_response(body, error.status, error.headers)


def shorten(value: object) -> str:
    """A client's value made safe for errors and logs: printable and short."""
    text = ascii(value[:100] if isinstance(value, (str, bytes)) else value)
    size = len(value) if isinstance(value, (str, bytes)) else len(text)
    return text if len(text) <= 60 else f"{text[:60]}... ({size} characters)"
