"""A small client of the server, on the standard library, for checks and tools."""

import io
import json
import secrets
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cifar_assets.contracts import CLASSES, IMAGE_SHAPE, MODEL_NAME
from cifar_assets.errors import CifarError

_BINARY = {"binary_data": True}


class ServerError(CifarError):
    """The server did not answer as asked. `status` is its HTTP status, None where there was no answer."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class ServedModel:
    """What the server says it serves."""

    ready: bool
    model_digest: str
    model_version: str


@dataclass(frozen=True)
class Predictions:
    """Answers in the order of the images, and the model that gave them."""

    classes: tuple[str, ...]
    probabilities: NDArray[np.float64]
    """Shape (N, 10), columns in the order of contracts.CLASSES."""
    model_digest: str
    model_version: str


@dataclass(frozen=True)
class InferenceClient:
    """Talks to one server. `headers` go with every request, `Host` for an ingress among them."""

    base_url: str
    timeout: float = 10.0
    """Seconds for one answer."""
    headers: Mapping[str, str] = field(default_factory=dict)

    def served_model(self) -> ServedModel:
        """Which model answers now. Raises ServerError where none does, or it is not ready."""
        answer = self._json(self._ask("GET", f"/v1/models/{MODEL_NAME}")[0])
        return ServedModel(bool(answer["ready"]), answer["model_digest"], answer["model_version"])

    def predict_arrays(self, images: NDArray[np.uint8]) -> Predictions:
        """Classify uint8 images of shape (N, 3, 32, 32), any number, in requests of 64."""
        if images.dtype != np.uint8 or images.shape[1:] != IMAGE_SHAPE or not len(images):
            raise ValueError(f"expected uint8 images of shape (N, {IMAGE_SHAPE}), got {images.dtype} {images.shape}")
        answers = [self._infer(images[start : start + 64]) for start in range(0, len(images), 64)]
        probabilities = np.concatenate([answer[0] for answer in answers])
        digests = {answer[1] for answer in answers}
        if len(digests) > 1:
            raise ServerError(f"The model changed between two requests: {sorted(digests)}. Ask again.")
        return Predictions(_names(probabilities), probabilities, answers[0][1], answers[0][2])

    def predict_files(self, paths: Sequence[Path]) -> Predictions:
        """Classify picture files in one multipart request."""
        boundary = secrets.token_hex(16)
        body = io.BytesIO()
        for index, path in enumerate(paths):
            body.write(
                f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{index}"\r\n\r\n'.encode()
            )
            body.write(path.read_bytes())
            body.write(b"\r\n")
        body.write(f"--{boundary}--\r\n".encode())
        content_type = f"multipart/form-data; boundary={boundary}"
        answer = self._json(
            self._ask("POST", f"/v1/models/{MODEL_NAME}:predict", body.getvalue(), {"Content-Type": content_type})[0]
        )
        rows = [[prediction["probabilities"][name] for name in CLASSES] for prediction in answer["predictions"]]
        probabilities = np.array(rows, dtype=np.float64)
        return Predictions(_names(probabilities), probabilities, answer["model_digest"], answer["model_version"])

    def _infer(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float64], str, str]:
        pixels = np.ascontiguousarray(images).tobytes()
        header = json.dumps(
            {
                "inputs": [
                    {
                        "name": "images",
                        "datatype": "UINT8",
                        "shape": list(images.shape),
                        "parameters": {"binary_data_size": len(pixels)},
                    }
                ],
                "outputs": [{"name": "probabilities", "parameters": _BINARY}],
            }
        ).encode()
        headers = {
            "Content-Type": "application/octet-stream",
            "Inference-Header-Content-Length": str(len(header)),
        }
        body, answer_headers = self._ask("POST", f"/v2/models/{MODEL_NAME}/infer", header + pixels, headers)
        header_length = int(answer_headers.get("Inference-Header-Content-Length") or 0)
        answer = self._json(body[:header_length])
        values = np.frombuffer(body[header_length:], dtype="<f4").reshape(answer["outputs"][0]["shape"])
        return values.astype(np.float64), answer["parameters"]["model_digest"], answer["model_version"]

    def _ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[bytes, Mapping[str, str]]:
        url = self.base_url.rstrip("/") + path
        request = urllib.request.Request(url, body, {**self.headers, **(headers or {})}, method=method)
        # No proxy: the server is on loopback or in the cluster, where a proxy of the environment does not reach it.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=self.timeout) as response:
                return response.read(), response.headers
        except urllib.error.HTTPError as error:
            with error:
                text = error.read(2000).decode("utf-8", "replace")
            raise ServerError(f"{method} {url} answered {error.code}: {text}", error.code) from error
        except (OSError, ValueError) as error:
            raise ServerError(f"{method} {url} was not answered: {error}") from error

    def _json(self, body: bytes) -> dict[str, Any]:
        try:
            return json.loads(body)
        except ValueError as error:
            raise ServerError(f"{self.base_url} did not answer with JSON: {body[:100]!r}") from error


def _names(probabilities: NDArray[np.float64]) -> tuple[str, ...]:
    return tuple(CLASSES[index] for index in probabilities.argmax(axis=1))
