"""What the server answers: responses, predictions in the V1 form, errors."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from cifar_assets.contracts import CLASSES
from cifar_assets.serving.faults import RequestError

JSON_TYPE = "application/json"


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
    return json_response(error.body(), error.status, tuple(error.headers.items()))


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Probabilities of each row, in float64 so that a row sums to one."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def predictions(logits: NDArray[np.float32], identity: ModelIdentity) -> Response:
    """The V1 answer: class, confidence and ten probabilities for each image, and which model said so."""
    found = []
    for row in softmax(logits).tolist():
        confidence = max(row)
        named = dict(zip(CLASSES, row, strict=True))
        found.append({"class": CLASSES[row.index(confidence)], "confidence": confidence, "probabilities": named})
    return json_response(
        {
            "predictions": found,
            "model_name": identity.name,
            "model_version": identity.version,
            "model_digest": identity.digest,
        }
    )
