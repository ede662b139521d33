"""What is served at which address, and how a request gets to the model.

A small request is read, decoded and queued where it arrives, on the event loop, without a task or another thread. Large
bodies and large pictures are read in a thread, the cheaper ones first.
"""

import asyncio
import heapq
import itertools
import logging
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from cifar_assets.serving.answers import (
    BusyError,
    ModelIdentity,
    RequestError,
    Response,
    error_response,
    json_response,
    predictions,
    shorten,
)
from cifar_assets.serving.batcher import Images, Logits, MicroBatcher, NotFiniteError
from cifar_assets.serving.http import Request
from cifar_assets.serving.metrics import PENDING_REQUESTS, PREDICT_SECONDS, READ_SECONDS, REGISTRY, RENDER_SECONDS
from cifar_assets.serving.settings import ServingLimits
from cifar_assets.serving.v1 import Pictures, parse_form, parse_predict
from cifar_assets.serving.v2 import HEADER_LENGTH, INPUT_METADATA, OUTPUT_METADATA, parse_infer, render_infer

_log = logging.getLogger(__name__)

_METRICS_SECONDS = 0.25
_OPENAPI = Path(__file__).with_name("openapi.json")
_SECONDS_PER_PIXEL = 50e-9
"""How much later a picture's turn comes for each of its pixels."""
_JSON_TYPES = (b"", b"application/json", b"text/plain", b"application/x-www-form-urlencoded")
"""Types under which a body is read as JSON: what curl sends for `-d`, declared or not."""
_FORM_TYPE = b"multipart/form-data"

Rendered = Callable[[Logits], Response]
Parsed = tuple[Images | Pictures, Rendered]
T = TypeVar("T")


class App:
    """Answers requests about one served model. Create and use it on the event loop."""

    def __init__(
        self,
        identity: ModelIdentity,
        run: Callable[[Images], Logits],
        limits: ServingLimits,
        is_ready: Callable[[], bool],
    ):
        self._identity = identity
        self._limits = limits
        self._is_ready = is_ready
        self._num_pending = 0
        self._num_pending_pixels = 0
        self._metrics_text = b""
        self._metrics_expire_at = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._reader = _Reader()
        self._batcher = MicroBatcher(run, batch_images=limits.batch_images, queue_images=limits.queue_images)
        self._read_seconds, self._predict_seconds, self._render_seconds = (
            histogram.labels(identity.name) for histogram in (READ_SECONDS, PREDICT_SECONDS, RENDER_SECONDS)
        )
        self._gets, self._posts = self._routes()
        PENDING_REQUESTS.set_function(lambda: self._num_pending)

    def __call__(self, request: Request) -> None:
        """Answer the request, now or later."""
        try:
            post = self._posts.get(request.path)
            if post is not None and request.method == "POST":
                self._predict(request, post)
                return
            get = self._gets.get(request.path)
            if get is not None and request.method in ("GET", "HEAD"):
                request.answer(get())
            else:
                request.answer(self._not_here(request))
        except Exception as error:
            request.answer(_fault_response(request, error))

    def close(self) -> None:
        """End the threads, after what they are at."""
        self._reader.close()
        self._batcher.close()

    def _routes(self) -> tuple[dict[str, Callable[[], Response]], dict[str, Callable[[Request], Parsed]]]:
        name, version, digest = self._identity.name, self._identity.version, self._identity.digest
        models = partial(json_response, {"models": [name]})
        status = partial(self._status, name=name, model_version=version, model_digest=digest)
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
            "/v2": partial(
                json_response, {"name": "cifar10-server", "version": "1", "extensions": ["binary_tensor_data"]}
            ),
            "/v2/health/live": partial(json_response, {"live": True}),
            "/v2/health/ready": self._status,
            "/metrics": self._metrics,
            "/openapi.json": partial(Response, 200, _OPENAPI.read_bytes()),
        }
        posts: dict[str, Callable[[Request], Parsed]] = {}
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
        ready = self._is_ready()
        return json_response({**model, "ready": ready}, 200 if ready else 503)

    def _not_here(self, request: Request) -> Response:
        path = request.path
        allowed = "GET, HEAD" if path in self._gets else "POST" if path in self._posts else None
        if re.fullmatch(rf"/v1/models/{re.escape(self._identity.name)}:(?!predict$)\w+", path):
            allowed = ""  # a verb of the protocol that this model does not have, such as :explain
        if allowed is not None:
            error = f"{shorten(request.method)} {shorten(path)}: Method Not Allowed."
            return json_response({"error": error}, 405, (("Allow", allowed),))
        found = re.match(r"/v[12]/models/([^/:]+)(?:/versions/([^/:]+))?", path)
        error = f"{shorten(request.method)} {shorten(path)}: Not Found."
        if found and found[1] != self._identity.name:
            error = f"Model with name {shorten(found[1])} does not exist. Served here: {self._identity.name}."
        elif found and found[2] and found[2] != self._identity.version:
            error = f"Version {shorten(found[2])} is not served here, version {self._identity.version} is."
        return json_response({"error": error}, 404)

    def _parse_v1(self, request: Request) -> Parsed:
        expected = "application/json, or multipart/form-data with a part named 'image'"
        if _body_type(request, _FORM_TYPE, expected) == _FORM_TYPE:
            pictures = parse_form(request.headers[b"content-type"], request.body, self._limits)
        else:
            pictures = parse_predict(request.body, self._limits)
        return pictures, partial(predictions, identity=self._identity)

    def _parse_v2(self, request: Request) -> Parsed:
        _body_type(request, b"application/octet-stream", "application/json or application/octet-stream")
        infer = parse_infer(request.body, request.headers.get(HEADER_LENGTH), self._limits)
        return infer.images, lambda logits: render_infer(infer, logits, self._identity)

    def _predict(self, request: Request, parse: Callable[[Request], Parsed]) -> None:
        retry_after = self._batcher.retry_after()
        _check_room("requests", self._num_pending, self._limits.max_pending_requests, retry_after)
        self._batcher.check_room(1)
        self._num_pending += 1
        self._metrics_expire_at = 0.0
        started = time.monotonic()
        try:
            parsed = None
            if len(request.body) <= self._limits.small_body_bytes:
                images, render = parsed = parse(request)
                if isinstance(images, Pictures) and images.num_pixels <= self._limits.small_pixels:
                    images = images.decode()
                if not isinstance(images, Pictures):
                    self._submit(request, images, render, started)
                    return
            _check_room("large requests", len(self._tasks), self._limits.max_large_requests, retry_after)
        except Exception as error:
            self._answer(request, _fault_response(request, error))
            return
        task = asyncio.get_running_loop().create_task(self._predict_large(request, parse, parsed, started))
        self._tasks.add(task)  # the loop itself keeps none
        task.add_done_callback(self._tasks.discard)

    async def _predict_large(
        self, request: Request, parse: Callable[[Request], Parsed], parsed: Parsed | None, started: float
    ) -> None:
        try:
            images, render = parsed or await self._reader.run(0, lambda: parse(_wanted(request)))
            if isinstance(images, Pictures):
                images = await self._decode(request, images)
            self._submit(request, images, render, started)
        except Exception as error:
            self._answer(request, _fault_response(request, error))

    async def _decode(self, request: Request, pictures: Pictures) -> Images:
        def decode() -> Images:
            _wanted(request)
            return pictures.decode()

        num_pixels = pictures.num_pixels
        if self._num_pending_pixels and self._num_pending_pixels + num_pixels > self._limits.max_pending_pixels:
            limit = f"at most {self._limits.max_pending_pixels} pixels that wait to be decoded"
            raise BusyError("server", limit, f"{self._num_pending_pixels} and {num_pixels}", retry_after=1)
        self._num_pending_pixels += num_pixels
        try:
            return await self._reader.run(num_pixels, decode)
        finally:
            self._num_pending_pixels -= num_pixels

    def _submit(self, request: Request, images: Images, render: Rendered, started: float) -> None:
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
                response = _fault_response(request, error)
            self._render_seconds.observe(time.monotonic() - finished)
            self._answer(request, response)

        self._batcher.submit(images, done, lambda: request.is_wanted)

    def _answer(self, request: Request, response: Response) -> None:
        self._num_pending -= 1
        self._metrics_expire_at = 0.0
        request.answer(response)


class _Reader:
    """One thread for what would hold up the event loop. Cheap calls overtake expensive ones of the last moments."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self._waiting: list[tuple[float, int, asyncio.Future[None]]] = []
        self._count = itertools.count()
        self._is_busy = False

    async def run(self, num_pixels: int, call: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        if self._is_busy:
            turn = loop.create_future()
            due = time.monotonic() + num_pixels * _SECONDS_PER_PIXEL
            heapq.heappush(self._waiting, (due, next(self._count), turn))
            await turn
        self._is_busy = True
        try:
            return await loop.run_in_executor(self._executor, call)
        finally:
            self._is_busy = bool(self._waiting)
            if self._waiting:
                heapq.heappop(self._waiting)[2].set_result(None)

    def close(self) -> None:
        self._executor.shutdown()


def _check_room(what: str, number: int, limit: int, retry_after: int) -> None:
    if number >= limit:
        raise BusyError("server", f"at most {limit} {what} at a time", str(number), retry_after=retry_after)


def _wanted(request: Request) -> Request:
    if not request.is_wanted:
        raise ConnectionAbortedError("its client has gone")
    return request


def _body_type(request: Request, other_type: bytes, expected: str) -> bytes:
    """The declared type of the body, refused where it is neither JSON nor the other one."""
    declared = request.headers.get(b"content-type", b"")
    found = declared.partition(b";")[0].strip().lower()
    if found not in _JSON_TYPES and found != other_type:
        raise RequestError("Content-Type", expected, shorten(declared.decode("latin-1")), status=415)
    return found


def _fault_response(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestError):
        return error_response(error)
    if isinstance(error, NotFiniteError):
        _log.error("%s %s: %s", shorten(request.method), shorten(request.path), error)
        return json_response({"error": f"{error} There is no class to name: the model is broken."}, 500)
    if not isinstance(error, ConnectionAbortedError):
        _log.error("%s %s failed", shorten(request.method), shorten(request.path), exc_info=error)
    return json_response({"error": "The server failed on this request; its log says why."}, 500)
