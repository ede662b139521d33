"""The kserve model: read a request, join the queue, wait for the answer, render it."""

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cifar_assets.contracts import CLASSES
from cifar_assets.serving.batcher import MicroBatcher
from cifar_assets.serving.classifier import Classifier, softmax
from cifar_assets.serving.faults import RequestError, shorten
from cifar_assets.serving.identity import ModelIdentity
from cifar_assets.serving.kserve_sdk import Model
from cifar_assets.serving.limits import ServingLimits
from cifar_assets.serving.multipart import parse_form
from cifar_assets.serving.v1 import parse_predict
from cifar_assets.serving.v2 import HEADER_LENGTH, InferAnswer, InferRequest, parse_infer, render_infer

_JSON_TYPES = ("", "application/json", "text/plain", "application/x-www-form-urlencoded")
"""Types under which a body is read as JSON: what curl sends for `-d`, declared or not."""


@dataclass(frozen=True)
class ClientCall:
    """A request as it came, for the protocol of the address it came to."""

    protocol: Literal["v1", "v2"]
    body: bytes
    headers: dict[str, str]
    """Names in lower case."""


@dataclass(frozen=True)
class _Queued:
    infer: InferRequest | None
    """The V2 request; None for V1."""
    logits: "Future[NDArray[np.float32]]"


class CifarModel(Model):
    """Serves one verified classifier. Bodies are read in one thread and run in another; the event loop only waits."""

    def __init__(self, identity: ModelIdentity, classifier: Classifier, limits: ServingLimits):
        super().__init__(identity.name)
        self.identity = identity
        self._limits = limits
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self.batcher = MicroBatcher(
            classifier.run,
            batch_images=limits.batch_images,
            batch_delay=limits.batch_delay,
            queue_images=limits.queue_images,
        )
        self.ready = True

    def stop(self) -> None:
        """Finish what is queued and end the threads."""
        self.ready = False
        self._reader.shutdown()
        self.batcher.close()

    async def preprocess(self, payload: ClientCall, headers: dict[str, str] | None = None) -> _Queued:  # pyright: ignore[reportIncompatibleMethodOverride] - kserve passes on what the route gave
        with self.batcher.arriving() as arrival:
            loop = asyncio.get_running_loop()
            images, infer = await loop.run_in_executor(self._reader, self._read, payload)
            return _Queued(infer, arrival.submit(images))

    async def predict(self, payload: _Queued, headers: dict[str, str] | None = None) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride] - takes what preprocess gives
        return payload.infer, await asyncio.wrap_future(payload.logits)

    async def postprocess(  # pyright: ignore[reportIncompatibleMethodOverride] - takes what predict gives
        self, result: tuple[InferRequest | None, NDArray[np.float32]], headers: dict[str, str] | None = None
    ) -> dict[str, Any] | InferAnswer:
        infer, logits = result
        if infer is not None:
            return render_infer(infer, logits, self.identity)
        return render_predictions(logits, self.identity)

    def _read(self, call: ClientCall) -> tuple[NDArray[np.uint8], InferRequest | None]:
        content_type = call.headers.get("content-type", "")
        media_type = content_type.partition(";")[0].strip().lower()
        if call.protocol == "v2":
            if media_type not in (*_JSON_TYPES, "application/octet-stream"):
                raise _wrong_type(content_type, "application/json or application/octet-stream")
            infer = parse_infer(call.body, call.headers.get(HEADER_LENGTH), self._limits)
            return infer.images, infer
        if media_type == "multipart/form-data":
            return parse_form(content_type, call.body, self._limits), None
        if media_type not in _JSON_TYPES:
            raise _wrong_type(content_type, "application/json, or multipart/form-data with a part named 'image'")
        return parse_predict(call.body, self._limits), None


def render_predictions(logits: NDArray[np.float32], identity: ModelIdentity) -> dict[str, Any]:
    """The V1 answer: class, confidence and ten probabilities for each image, and which model said so."""
    predictions = []
    for row in softmax(logits):
        best = int(row.argmax())
        predictions.append(
            {
                "class": CLASSES[best],
                "confidence": float(row[best]),
                "probabilities": dict(zip(CLASSES, row.tolist(), strict=True)),
            }
        )
    return {
        "predictions": predictions,
        "model_name": identity.name,
        "model_version": identity.version,
        "model_digest": identity.digest,
    }


def _wrong_type(content_type: str, expected: str) -> RequestError:
    return RequestError("Content-Type", expected, shorten(content_type), status=415)
