"""The HTTP surface on kserve's application: addresses, errors, OpenAPI."""

import logging
from collections.abc import Callable
from typing import Any

import fastapi
import orjson
from fastapi import Request, Response
from starlette.exceptions import HTTPException

from cifar_assets.contracts import CLASSES, MODEL_NAME
from cifar_assets.serving.faults import RequestError
from cifar_assets.serving.identity import ModelIdentity
from cifar_assets.serving.kserve_sdk import DataPlane, ModelNotFound, RESTServer, metrics_handler
from cifar_assets.serving.openapi import INFER_DOCS, PREDICT_DOCS
from cifar_assets.serving.predictor import ClientCall
from cifar_assets.serving.v2 import HEADER_LENGTH, INPUT_METADATA, OUTPUT_METADATA, InferAnswer

_log = logging.getLogger(__name__)
_MODEL_PATH = "{model_name}"


class CifarRESTServer(RESTServer):
    """kserve's REST server with the addresses this project answers.

    Left out are those that would let a client unload the model or that can only fail (explain), and the middleware that
    logs every request twice.
    """

    def __init__(self, *arguments: Any, identity: ModelIdentity, is_ready: Callable[[], bool], **options: Any):
        super().__init__(*arguments, **options)
        self._endpoints = Endpoints(self.dataplane, identity, is_ready)

    def _register_endpoints(self, app: fastapi.FastAPI) -> None:
        self._endpoints.register(app)

    def _add_exception_handlers(self, app: fastapi.FastAPI) -> None:
        app.add_exception_handler(RequestError, _request_fault)
        app.add_exception_handler(ModelNotFound, _model_not_found)
        app.add_exception_handler(HTTPException, _http_fault)
        app.add_exception_handler(Exception, _own_fault)

    def _add_middlewares(self, app: fastapi.FastAPI) -> None:
        pass


class Endpoints:
    """Handlers for one served model. Health answers from memory, whatever the queue holds."""

    def __init__(self, dataplane: DataPlane, identity: ModelIdentity, is_ready: Callable[[], bool]):
        self._dataplane = dataplane
        self._identity = identity
        self._is_ready = is_ready

    def register(self, app: fastapi.FastAPI) -> None:
        app.title = "CIFAR-10 classifier"
        app.version = self._identity.version
        app.description = f"Sorts pictures into {', '.join(CLASSES)}."
        model = f"/models/{_MODEL_PATH}"
        for path, handler, summary in (
            ("/", self.live, "Liveness"),
            ("/v1/models", self.models, "Names of the models"),
            (f"/v1{model}", self.model_status, "Readiness, version and digest of the model"),
            ("/v2", self.server_metadata, "Server metadata"),
            ("/v2/health/live", self.live_v2, "Liveness"),
            ("/v2/health/ready", self.ready_v2, "Readiness"),
            ("/v2/models", self.models, "Names of the models"),
            (f"/v2{model}", self.model_metadata, "Inputs and outputs of the model"),
            (f"/v2{model}/ready", self.model_status, "Readiness, version and digest of the model"),
            ("/metrics", metrics_handler, "Prometheus metrics"),
        ):
            app.add_api_route(path, handler, methods=["GET"], summary=summary, response_model=None)
        for path, handler, docs in (
            (f"/v1{model}:predict", self.predict, PREDICT_DOCS),
            (f"/v2{model}/infer", self.infer, INFER_DOCS),
        ):
            app.add_api_route(
                path, handler, methods=["POST"], response_model=None, summary=docs["summary"], openapi_extra=docs
            )

    async def live(self) -> Response:
        return _json({"status": "alive"})

    async def live_v2(self) -> Response:
        return _json({"live": True})

    async def ready_v2(self) -> Response:
        ready = self._is_ready()
        return _json({"ready": ready}, status=200 if ready else 503)

    async def models(self) -> Response:
        return _json({"models": [self._identity.name]})

    async def model_status(self, model_name: str) -> Response:
        self._check_name(model_name)
        ready = self._is_ready()
        return _json(
            {
                "name": self._identity.name,
                "ready": ready,
                "model_version": self._identity.version,
                "model_digest": self._identity.digest,
            },
            status=200 if ready else 503,
        )

    async def server_metadata(self) -> Response:
        return _json({"name": "cifar10-server", "version": "1", "extensions": ["binary_tensor_data"]})

    async def model_metadata(self, model_name: str) -> Response:
        self._check_name(model_name)
        return _json(
            {
                "name": self._identity.name,
                "versions": [self._identity.version],
                "platform": "onnxruntime_onnx",
                "inputs": [INPUT_METADATA],
                "outputs": OUTPUT_METADATA,
                "properties": {"model_digest": self._identity.digest},
            }
        )

    async def predict(self, model_name: str, request: Request) -> Response:
        call = ClientCall("v1", await request.body(), dict(request.headers))
        answer, _ = await self._dataplane.infer(model_name, call)  # pyright: ignore[reportArgumentType] - it passes the request to the model as it is
        return _json(answer)

    async def infer(self, model_name: str, request: Request) -> Response:
        call = ClientCall("v2", await request.body(), dict(request.headers))
        answer, _ = await self._dataplane.infer(model_name, call)  # pyright: ignore[reportArgumentType] - it passes the request to the model as it is
        assert isinstance(answer, InferAnswer)
        if answer.header_length is None:
            return Response(answer.body, media_type="application/json")
        return Response(
            answer.body,
            media_type="application/octet-stream",
            headers={HEADER_LENGTH: str(answer.header_length)},
        )

    def _check_name(self, model_name: str) -> None:
        if model_name.endswith(":predict"):
            raise HTTPException(405, "Method Not Allowed, use POST", {"Allow": "POST"})
        if model_name != self._identity.name:
            raise ModelNotFound(model_name)


def _json(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, headers, media_type="application/json")


async def _request_fault(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _json(error.body(), status=error.status, headers=error.headers)


async def _model_not_found(request: Request, error: Exception) -> Response:
    return _json({"error": f"{error} Served here: {MODEL_NAME}."}, status=404)


async def _http_fault(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    return _json(
        {"error": f"{request.method} {request.url.path}: {error.detail}."}, status=error.status_code, headers=headers
    )


async def _own_fault(request: Request, error: Exception) -> Response:
    _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _json({"error": "The server failed on this request; its log says why."}, status=500)
