"""A client of a server that speaks the V1 and V2 protocols, on the standard library, for checks and tools."""

import http.client
import json
import secrets
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resources.errors import ExplainedError


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

    probabilities: NDArray[np.float64]
    """One row for each image, one column for each class."""
    model_digest: str
    model_version: str
    classes: tuple[str, ...] = ()
    """Names of the most probable classes; the answers to arrays have none."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Columns of the most probable classes."""
        return self.probabilities.argmax(axis=1)


@dataclass(frozen=True)
class InferenceClient:
    """Talks to one server of one model. `headers` go with every request, `Host` for an ingress among them.

    ServerError where nothing answers, or something that is not such a server.
    """

    base_url: str
    timeout: float = 10.0
    """Seconds for one answer."""
    headers: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def model_name(self) -> str:
        """The name in the addresses of the model."""
        body, _ = self._ask("GET", "/v1/models")
        with self._reading(body):
            return str(json.loads(body)["models"][0])

    @cached_property
    def _input(self) -> dict[str, Any]:
        """Name and shape of the model's input, as its metadata declare them."""
        body, _ = self._ask("GET", f"/v2/models/{self.model_name}")
        with self._reading(body):
            (found,) = json.loads(body)["inputs"]
            return {"name": str(found["name"]), "shape": tuple(map(int, found["shape"]))}

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return self._input["shape"][1:]

    def served_model(self) -> ServedModel:
        """Which model answers now. Raises ServerError where none does, or it is not ready."""
        body, _ = self._ask("GET", f"/v1/models/{self.model_name}")
        with self._reading(body):
            answer = json.loads(body)
            return ServedModel(bool(answer["ready"]), str(answer["model_digest"]), str(answer["model_version"]))

    def predict_arrays(self, images: NDArray[np.uint8]) -> Predictions:
        """Classify uint8 images, any number, in requests of 64."""
        if images.dtype != np.uint8 or images.shape[1:] != self.image_shape or not len(images):
            shape = ", ".join(map(str, self.image_shape))
            raise ValueError(f"expected uint8 images of shape (N, {shape}), got {images.dtype} {images.shape}")
        answers = [self._infer(images[start : start + 64]) for start in range(0, len(images), 64)]
        digests = {answer.model_digest for answer in answers}
        if len(digests) > 1:
            raise ServerError(f"The model changed between two requests: {sorted(digests)}. Ask again.")
        return replace(answers[0], probabilities=np.concatenate([answer.probabilities for answer in answers]))

    def predict_files(self, paths: Sequence[Path]) -> Predictions:
        """Classify picture files in one multipart request."""
        boundary = secrets.token_hex(16)
        body = b""
        for index, path in enumerate(paths):
            disposition = f'Content-Disposition: form-data; name="image"; filename="{index}"'
            body += f"--{boundary}\r\n{disposition}\r\n\r\n".encode() + path.read_bytes() + b"\r\n"
        body += f"--{boundary}--\r\n".encode()
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        text, _ = self._ask("POST", f"/v1/models/{self.model_name}:predict", body, headers)
        with self._reading(text):
            answer = json.loads(text)
            found = answer["predictions"]
            rows = [list(prediction["probabilities"].values()) for prediction in found]
            probabilities = np.array(rows, dtype=np.float64).reshape(len(paths), -1)
            classes = tuple(str(prediction["class"]) for prediction in found)
            return Predictions(probabilities, str(answer["model_digest"]), str(answer["model_version"]), classes)

    def _infer(self, images: NDArray[np.uint8]) -> Predictions:
        pixels = np.ascontiguousarray(images).tobytes()
        tensor = {"name": self._input["name"], "datatype": "UINT8", "shape": images.shape}
        request = {
            "inputs": [{**tensor, "parameters": {"binary_data_size": len(pixels)}}],
            "outputs": [{"name": "probabilities", "parameters": {"binary_data": True}}],
        }
        header = json.dumps(request).encode()
        headers = {
            "Content-Type": "application/octet-stream",
            "Inference-Header-Content-Length": str(len(header)),
        }
        body, answer_headers = self._ask("POST", f"/v2/models/{self.model_name}/infer", header + pixels, headers)
        with self._reading(body):
            header_length = int(answer_headers["Inference-Header-Content-Length"])
            answer = json.loads(body[:header_length])
            values = np.frombuffer(body[header_length:], dtype="<f4").reshape(len(images), -1).astype(np.float64)
            return Predictions(values, str(answer["parameters"]["model_digest"]), str(answer["model_version"]))

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
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ServerError(
                f"{self.base_url} answers, but not as a model server does: {body[:100]!r} "
                f"({type(error).__name__}: {error})"
            ) from error
