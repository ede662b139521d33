"""A small client of the server, on the standard library, for checks and tools."""

import http.client
import io
import json
import secrets
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cifar_assets.contracts import CLASSES, IMAGE_SHAPE, MODEL_INPUT, MODEL_NAME
from resources.errors import ExplainedError

_BINARY = {"binary_data": True}


class ServerError(ExplainedError):
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
    """Talks to one server. `headers` go with every request, `Host` for an ingress among them.

    ServerError where nothing answers, or something that is not a server of ours.
    """

    base_url: str
    timeout: float = 10.0
    """Seconds for one answer."""
    headers: Mapping[str, str] = field(default_factory=dict)

    def served_model(self) -> ServedModel:
        """Which model answers now. Raises ServerError where none does, or it is not ready."""
        body, _ = self._ask("GET", f"/v1/models/{MODEL_NAME}")
        with self._reading(body):
            answer = json.loads(body)
            return ServedModel(bool(answer["ready"]), str(answer["model_digest"]), str(answer["model_version"]))

    def predict_arrays(self, images: NDArray[np.uint8]) -> Predictions:
        """Classify uint8 images of shape (N, 3, 32, 32), any number, in requests of 64."""
        if images.dtype != np.uint8 or images.shape[1:] != IMAGE_SHAPE or not len(images):
            shape = ", ".join(map(str, IMAGE_SHAPE))
            raise ValueError(f"expected uint8 images of shape (N, {shape}), got {images.dtype} {images.shape}")
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
        text, _ = self._ask("POST", f"/v1/models/{MODEL_NAME}:predict", body.getvalue(), {"Content-Type": content_type})
        with self._reading(text):
            answer = json.loads(text)
            rows = [[prediction["probabilities"][name] for name in CLASSES] for prediction in answer["predictions"]]
            probabilities = np.array(rows, dtype=np.float64).reshape(len(paths), len(CLASSES))
            model = str(answer["model_digest"]), str(answer["model_version"])
        return Predictions(_names(probabilities), probabilities, *model)

    def _infer(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float64], str, str]:
        pixels = np.ascontiguousarray(images).tobytes()
        header = json.dumps(
            {
                "inputs": [
                    {
                        "name": MODEL_INPUT,
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
        with self._reading(body):
            header_length = int(answer_headers["Inference-Header-Content-Length"])
            answer = json.loads(body[:header_length])
            values = np.frombuffer(body[header_length:], dtype="<f4").reshape(len(images), len(CLASSES))
            model = str(answer["parameters"]["model_digest"]), str(answer["model_version"])
        return values.astype(np.float64), *model

    def _ask(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> tuple[bytes, Mapping[str, str]]:
        url = self.base_url.rstrip("/") + path
        request = urllib.request.Request(url, body, {**self.headers, **(headers or {})}, method=method)
        # No proxy: the server is on loopback or in the cluster, where a proxy of the environment does not reach it.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            try:
                with opener.open(request, timeout=self.timeout) as response:
                    return response.read(), response.headers
            except urllib.error.HTTPError as error:
                with error:
                    text = error.read(2000).decode("utf-8", "replace")
                raise ServerError(f"{method} {url} answered {error.code}: {text}", error.code) from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ServerError(f"{method} {url} was not answered: {type(error).__name__}: {error}") from error

    @contextmanager
    def _reading(self, body: bytes) -> Iterator[None]:
        try:
            yield
        except (ValueError, TypeError, LookupError) as error:
            raise ServerError(
                f"{self.base_url} answers, but not as a server of ours does: {body[:100]!r} "
                f"({type(error).__name__}: {error})"
            ) from error


def _names(probabilities: NDArray[np.float64]) -> tuple[str, ...]:
    return tuple(CLASSES[index] for index in probabilities.argmax(axis=1))
