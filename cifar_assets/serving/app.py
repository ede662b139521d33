"""What is served at which address, and how a request gets to the model.

A small request is read, decoded and queued where it arrives, on the event loop, without a task or another thread. Large
bodies and large pictures are read in a thread, the cheaper ones first.
"""

import asyncio
import itertools
import re
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from queue import PriorityQueue
from typing import Any, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from cifar_assets.serving.answers import (
    BusyError,
    Images,
    Logits,
    ModelIdentity,
    Query,
    RequestError,
    Response,
    error_response,
    json_response,
    shorten,
)
from cifar_assets.serving.batcher import MicroBatcher
from cifar_assets.serving.http import Request
from cifar_assets.serving.metrics import PENDING_REQUESTS, PREDICT_SECONDS, READ_SECONDS, REGISTRY, RENDER_SECONDS
from cifar_assets.serving.settings import ServingLimits
from cifar_assets.serving.v1 import parse_form, parse_predict
from cifar_assets.serving.v2 import HEADER_LENGTH, INPUT_METADATA, OUTPUT_METADATA, parse_infer

_METRICS_SECONDS = 0.25
_OPENAPI = Path(__file__).with_name("openapi.json")
_SECONDS_PER_PIXEL = 50e-9
"""How much later a picture's turn comes for each of its pixels."""
_JSON_TYPES = (b"", b"application/json", b"text/plain", b"application/x-www-form-urlencoded")
"""Types under which a body is read as JSON: what curl sends for `-d`, declared or not."""
_FORM_TYPE = b"multipart/form-data"
_BINARY_TYPE = b"application/octet-stream"

T = TypeVar("T")
Parse = Callable[[Request], Query]


class App:
    """Answers requests about one served model. Create and use it on the event loop."""

    def __init__(self, identity: ModelIdentity, run: Callable[[Images], Logits], limits: ServingLimits):
        self.is_ready = True
        self._identity = identity
        self._limits = limits
        self._num_pending = 0
        self._metrics_text = b""
        self._metrics_expire_at = 0.0
        self._large_requests: set[asyncio.Task[None]] = set()
        self._reader = _Reader(limits.max_pending_pixels)
        self._batcher = MicroBatcher(run, batch_images=limits.batch_images, queue_images=limits.queue_images)
        self._read_seconds, self._predict_seconds, self._render_seconds = (
            histogram.labels(identity.name) for histogram in (READ_SECONDS, PREDICT_SECONDS, RENDER_SECONDS)
        )
        self._gets, self._posts = self._routes()
        PENDING_REQUESTS.set_function(lambda: self._num_pending)

    def __call__(self, request: Request) -> None:
        """Answer the request, now or later."""
        parse = self._posts.get(request.path)
        get = self._gets.get(request.path)
        if parse is not None and request.method == "POST":
            self._predict(request, parse)
        elif get is not None and request.method in ("GET", "HEAD"):
            request.answer(get())
        else:
            request.answer(self._not_here(request))

    def close(self) -> None:
        """End the threads, after what they are at."""
        self._reader.close()
        self._batcher.close()

    def _routes(self) -> tuple[dict[str, Callable[[], Response]], dict[str, Parse]]:
        name, version, digest = self._identity.name, self._identity.version, self._identity.digest
        models = partial(json_response, {"models": [name]})
        status = partial(self._status, name=name, model_version=version, model_digest=digest)
        server = {"name": "cifar10-server", "version": "1", "extensions": ["binary_tensor_data"]}
        metadata = {
            "name": name,
            "versions": [version],
            "platform": "onnxruntime_onnx",
            "inputs": [INPUT_METADATA],
            "outputs": OUTPUT_METADATA,
            "properties": {"model_digest": digest},
            "picture_formats": ["PNG", "JPEG"],
        }
        gets: dict[str, Callable[[], Response]] = {
            "/": partial(json_response, {"status": "alive"}),
            "/v1/models": models,
            "/v2/models": models,
            "/v2": partial(json_response, server),
            "/v2/health/live": partial(json_response, {"live": True}),
            "/v2/health/ready": self._status,
            "/metrics": self._metrics,
            "/openapi.json": partial(Response, 200, _OPENAPI.read_bytes()),
        }
        posts: dict[str, Parse] = {}
        for suffix in ("", f"/versions/{version}"):
            gets[f"/v1/models/{name}{suffix}"] = gets[f"/v2/models/{name}{suffix}/ready"] = status
            gets[f"/v2/models/{name}{suffix}"] = partial(json_response, metadata)
            posts[f"/v1/models/{name}{suffix}:predict"] = self._parse_v1
            posts[f"/v2/models/{name}{suffix}/infer"] = self._parse_v2
        return gets, posts

    def _metrics(self) -> Response:
        """The metrics, gathered again when a prediction came or went, else a few times a second at most."""
        now = time.monotonic()
        if now > self._metrics_expire_at:
            self._metrics_text = generate_latest(REGISTRY)
            self._metrics_expire_at = now + _METRICS_SECONDS
        return Response(200, self._metrics_text, CONTENT_TYPE_LATEST)

    def _status(self, **model: str) -> Response:
        return json_response({**model, "ready": self.is_ready}, 200 if self.is_ready else 503)

    def _not_here(self, request: Request) -> Response:
        asked = f"{shorten(request.method)} {shorten(request.path)}"
        allowed = "GET, HEAD" if request.path in self._gets else "POST" if request.path in self._posts else None
        if re.fullmatch(rf"/v1/models/{re.escape(self._identity.name)}:(?!predict$)\w+", request.path):
            allowed = ""  # a verb of the protocol that this model does not have, such as :explain
        if allowed is not None:
            return json_response({"error": f"{asked}: Method Not Allowed."}, 405, (("Allow", allowed),))
        served = f"model {self._identity.name}, version {self._identity.version}"
        return json_response({"error": f"{asked}: Not Found. Served here: {served}; see /openapi.json."}, 404)

    def _parse_v1(self, request: Request) -> Query:
        expected = "application/json, or multipart/form-data with a part named 'image'"
        if _body_type(request, _FORM_TYPE, expected) == _FORM_TYPE:
            return parse_form(request.headers[b"content-type"], request.body, self._limits, self._identity)
        return parse_predict(request.body, self._limits, self._identity)

    def _parse_v2(self, request: Request) -> Query:
        _body_type(request, _BINARY_TYPE, "application/json or application/octet-stream")
        return parse_infer(request.body, request.headers.get(HEADER_LENGTH), self._limits, self._identity)

    def _predict(self, request: Request, parse: Parse) -> None:
        started = time.monotonic()
        self._num_pending += 1
        self._metrics_expire_at = 0.0
        try:
            self._check_room("requests", self._num_pending - 1, self._limits.max_pending_requests)
            self._batcher.check_room(1)
            query = None
            if len(request.body) <= self._limits.small_body_bytes:
                query = parse(request)
                if query.num_pixels <= self._limits.small_pixels:
                    self._submit(request, query.images(), query.render, started)
                    return
            self._check_room("large requests", len(self._large_requests), self._limits.max_large_requests)
        except Exception as error:
            self._answer(request, error_response(error))
            return
        task = asyncio.get_running_loop().create_task(self._predict_large(request, parse, query, started))
        self._large_requests.add(task)  # the loop itself keeps none
        task.add_done_callback(self._large_requests.discard)

    async def _predict_large(self, request: Request, parse: Parse, query: Query | None, started: float) -> None:
        try:
            if query is None:
                query = await self._reader.run(request, 0, partial(parse, request))
            images = await self._reader.run(request, query.num_pixels, query.images)
            self._submit(request, images, query.render, started)
        except Exception as error:
            self._answer(request, error_response(error))

    def _submit(self, request: Request, images: Images, render: Callable[[Logits], Response], started: float) -> None:
        submitted = time.monotonic()
        self._read_seconds.observe(submitted - started)

        def done(outcome: Logits | Exception) -> None:
            finished = time.monotonic()
            self._predict_seconds.observe(finished - submitted)
            try:
                if isinstance(outcome, Exception):
                    raise outcome
                response = render(outcome)
            except Exception as error:
                response = error_response(error)
            self._render_seconds.observe(time.monotonic() - finished)
            self._answer(request, response)

        self._batcher.submit(images, done, lambda: request.is_wanted)

    def _answer(self, request: Request, response: Response) -> None:
        self._num_pending -= 1
        self._metrics_expire_at = 0.0
        request.answer(response)

    def _check_room(self, what: str, number: int, limit: int) -> None:
        if number >= limit:
            raise BusyError(f"at most {limit} {what} at a time", str(number), retry_after=self._batcher.retry_after())


class _Reader:
    """One thread for what would hold up the event loop. Cheap calls overtake expensive ones of the last moments."""

    def __init__(self, max_pixels: int):
        self._max_pixels = max_pixels
        self._num_pixels = 0
        self._calls: PriorityQueue[tuple[float, int, Callable[[], None] | None]] = PriorityQueue()
        self._count = itertools.count()
        self._thread = threading.Thread(target=self._work, name="reader", daemon=True)
        self._thread.start()

    async def run(self, request: Request, num_pixels: int, call: Callable[[], T]) -> T:
        """What the call gives, which decodes so many pixels. BusyError where too many wait for that already."""
        if self._num_pixels and self._num_pixels + num_pixels > self._max_pixels:
            limit = f"at most {self._max_pixels} pixels that wait to be decoded"
            raise BusyError(limit, f"{self._num_pixels} and {num_pixels}")
        loop = asyncio.get_running_loop()
        outcome: asyncio.Future[Any] = loop.create_future()

        def work() -> None:
            try:
                if not request.is_wanted:
                    raise ConnectionAbortedError("its client has gone")
                loop.call_soon_threadsafe(outcome.set_result, call())
            except Exception as error:
                loop.call_soon_threadsafe(outcome.set_exception, error)

        self._num_pixels += num_pixels
        self._calls.put((time.monotonic() + num_pixels * _SECONDS_PER_PIXEL, next(self._count), work))
        try:
            return await outcome
        finally:
            self._num_pixels -= num_pixels

    def close(self) -> None:
        self._calls.put((0.0, next(self._count), None))
        self._thread.join()

    def _work(self) -> None:
        while (call := self._calls.get()[2]) is not None:
            call()


def _body_type(request: Request, other_type: bytes, expected: str) -> bytes:
    """The declared type of the body, refused where it is neither JSON nor the other one."""
    declared = request.headers.get(b"content-type", b"")
    found = declared.partition(b";")[0].strip().lower()
    if found not in _JSON_TYPES and found != other_type:
        raise RequestError("Content-Type", expected, shorten(declared.decode("latin-1")), status=415)
    return found
