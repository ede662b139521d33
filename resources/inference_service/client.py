"""A client of a server that speaks the V1 and V2 protocols, for checks and tools."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import urllib3
from numpy.typing import NDArray

from resources.errors import ExplainedError

T = TypeVar("T")


class ServerError(ExplainedError):
    """The server did not respond as expected. `status` is its HTTP status, None if there was no response."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class ServedModel:
    """The model that the server says it serves."""

    ready: bool
    model_digest: str
    model_version: str


@dataclass(frozen=True)
class Predictions:
    """Predictions in the order of the images, and the model that made them."""

    probabilities: NDArray[np.float64]
    """One row for each image, one column for each class."""
    model_digest: str
    model_version: str
    classes: tuple[str, ...] = ()
    """Names of the most probable classes; None for array requests."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Column indices of the most probable classes."""
        return self.probabilities.argmax(axis=1)


@dataclass(frozen=True)
class InferenceClient:
    """Talks to one server of one model. `headers` are sent with every request, such as `Host` for an ingress.

    ServerError if there is no response, or not from such a server.
    """

    base_url: str
    timeout: float = 10.0
    """Timeout of one request in seconds."""
    headers: Mapping[str, str] = field(default_factory=dict)
    is_traffic: bool = False
    """Whether the server may record the requests. It should not if they come from checks and tools."""

    @cached_property
    def model_name(self) -> str:
        """The model name in URLs."""
        return self._ask("/v1/models", lambda answer, _: str(answer["models"][0]))

    @cached_property
    def _input(self) -> tuple[str, tuple[int, ...]]:
        """Name of the model's input and shape of one image, from its metadata."""

        def read(answer: Any, _: Any) -> tuple[str, tuple[int, ...]]:
            (found,) = answer["inputs"]
            return str(found["name"]), tuple(map(int, found["shape"][1:]))

        return self._ask(f"/v2/models/{self.model_name}", read)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return self._input[1]

    def served_model(self) -> ServedModel:
        """The model that is served now. Raises ServerError if there is none, or it is not ready."""

        def read(answer: Any, _: Any) -> ServedModel:
            return ServedModel(bool(answer["ready"]), str(answer["model_digest"]), str(answer["model_version"]))

        return self._ask(f"/v1/models/{self.model_name}", read)

    def predict_arrays(self, images: NDArray[np.uint8]) -> Predictions:
        """Classify any number of uint8 images, in requests of 64."""
        if images.dtype != np.uint8 or images.shape[1:] != self.image_shape or not len(images):
            shape = ", ".join(map(str, self.image_shape))
            raise ValueError(f"expected uint8 images of shape (N, {shape}), got {images.dtype} {images.shape}")
        answers = [self._infer(images[start : start + 64]) for start in range(0, len(images), 64)]
        digests = {answer.model_digest for answer in answers}
        if len(digests) > 1:
            raise ServerError(f"The model changed between two requests: {sorted(digests)}. Send the images again.")
        return replace(answers[0], probabilities=np.concatenate([answer.probabilities for answer in answers]))

    def predict_files(self, paths: Sequence[Path]) -> Predictions:
        """Classify picture files in one multipart request."""

        def read(answer: Any, _: Any) -> Predictions:
            found = answer["predictions"]
            rows = [list(prediction["probabilities"].values()) for prediction in found]
            probabilities = np.array(rows, dtype=np.float64).reshape(len(paths), -1)
            classes = tuple(str(prediction["class"]) for prediction in found)
            return Predictions(probabilities, str(answer["model_digest"]), str(answer["model_version"]), classes)

        form, kind = urllib3.encode_multipart_formdata([("image", (path.name, path.read_bytes())) for path in paths])
        return self._ask(f"/v1/models/{self.model_name}:predict", read, form, {"Content-Type": kind})

    def _infer(self, images: NDArray[np.uint8]) -> Predictions:
        def read(answer: Any, binary: bytes) -> Predictions:
            values = np.frombuffer(binary, dtype="<f4").reshape(len(images), -1)
            return Predictions(
                values.astype(np.float64), str(answer["parameters"]["model_digest"]), str(answer["model_version"])
            )

        pixels = np.ascontiguousarray(images).tobytes()
        tensor = {"name": self._input[0], "datatype": "UINT8", "shape": images.shape}
        request = {
            "inputs": [{**tensor, "parameters": {"binary_data_size": len(pixels)}}],
            "outputs": [{"name": "probabilities", "parameters": {"binary_data": True}}],
        }
        header = json.dumps(request).encode()
        headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(header))}
        return self._ask(f"/v2/models/{self.model_name}/infer", read, header + pixels, headers)

    def _ask(
        self,
        path: str,
        read: Callable[[Any, bytes], T],
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> T:
        """The result of `read` for the response's JSON and binary parts. Uses a new connection, and no proxy."""
        method, url = "GET" if body is None else "POST", self.base_url.rstrip("/") + path
        unrecorded = {} if self.is_traffic else {"Cache-Control": "no-store"}
        try:
            with urllib3.PoolManager(timeout=self.timeout, retries=False) as pool:
                answer = pool.request(method, url, body=body, headers={**unrecorded, **self.headers, **(headers or {})})
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise ServerError(f"{method} {url} got no response: {type(error).__name__}: {error}") from error
        if answer.status != 200:
            text = answer.data[:2000].decode("utf-8", "replace")
            raise ServerError(f"{method} {url} answered {answer.status}: {text}", answer.status)
        try:
            length = int(answer.headers.get("Inference-Header-Content-Length", len(answer.data)))
            return read(json.loads(answer.data[:length]), answer.data[length:])
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ServerError(
                f"{url} did not respond like a model server: {answer.data[:100]!r} ({type(error).__name__}: {error})"
            ) from error
