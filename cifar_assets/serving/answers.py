"""What the server answers: predictions, and faults with the HTTP status and the JSON body that tell them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from cifar_assets.contracts import CLASSES
from resources.errors import ExplainedError

JSON_TYPE = "application/json"


class RequestError(ExplainedError):
    """A request cannot be answered. `field` names the part of it: `instances[2]`, `image[0]`, `inputs[0].shape`."""

    status = 400

    def __init__(self, field: str, expected: str, received: str, *, status: int | None = None):
        super().__init__(f"{field}: expected {expected}, got {received}.")
        self.field = field
        self.expected = expected
        self.received = received
        self.status = status or self.status
        self.headers: tuple[tuple[str, str], ...] = ()


class BusyError(RequestError):
    """The server is full. The client should try again after `retry_after` seconds."""

    status = 429

    def __init__(self, field: str, expected: str, received: str, *, retry_after: int):
        super().__init__(field, expected, received)
        self.retry_after = retry_after
        self.headers = (("Retry-After", str(retry_after)),)


@dataclass(frozen=True)
class Response:
    """An answer, complete but for what the connection adds."""

    status: int
    body: bytes
    content_type: str = JSON_TYPE
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ModelIdentity:
    """Name in addresses and answers, version for people, digest for decisions."""

    name: str
    version: str
    digest: str


def json_response(value: Any, status: int = 200, headers: tuple[tuple[str, str], ...] = ()) -> Response:
    """A JSON answer."""
    return Response(status, orjson.dumps(value), JSON_TYPE, headers)


def error_response(error: RequestError) -> Response:
    """The answer that tells a client what is wrong."""
    body = {"error": str(error), "field": error.field, "expected": error.expected, "received": error.received}
    return json_response(body, error.status, error.headers)


def shorten(value: object) -> str:
    """A value as it may be repeated in an error or a log: printable and short, whatever a client sent."""
    text = ascii(value[:100] if isinstance(value, (str, bytes)) else value)
    size = len(value) if isinstance(value, (str, bytes)) else len(text)
    return text if len(text) <= 60 else f"{text[:60]}... ({size} characters)"


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Probabilities of each row, in float64 so that a row sums to one."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def predictions(logits: NDArray[np.float32], identity: ModelIdentity) -> Response:
    """The V1 answer: class, confidence and all probabilities for each image, and which model said so."""
    found = []
    for row in softmax(logits).tolist():
        confidence = max(row)
        named = dict(zip(CLASSES, row, strict=True))
        found.append({"class": CLASSES[row.index(confidence)], "confidence": confidence, "probabilities": named})
    model = {"model_name": identity.name, "model_version": identity.version, "model_digest": identity.digest}
    return json_response({"predictions": found, **model})
