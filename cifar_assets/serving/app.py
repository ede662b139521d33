"""The routes of the server, and the path of a request to the model.

A small request is read, decoded and queued on the event loop, without a task or another thread. Large bodies and large
pictures are read in a thread, and very large pictures in a separate one.
"""

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from cifar_assets.serving import page, v1, v2
from cifar_assets.serving.answers import (
    BusyError,
    GoneError,
    Images,
    Logits,
    Query,
    Response,
    ServedModel,
    error_response,
    json_response,
    shorten,
)
from cifar_assets.serving.batcher import MicroBatcher, Run
from cifar_assets.serving.feedback import FEEDBACK_PATH, take_feedback
from cifar_assets.serving.http import Request
from cifar_assets.serving.metrics import (
    MODEL,
    PENDING_REQUESTS,
    PREDICT_SECONDS,
    READ_SECONDS,
    REGISTRY,
    RENDER_SECONDS,
)
from cifar_assets.serving.recorder import Recorder
from cifar_assets.serving.settings import ServerSettings, ServingLimits

_METRICS_SECONDS = 0.25
_OPENAPI = Path(__file__).with_name("openapi.json")
_HUGE_PIXELS = 1024 * 1024
"""Larger pictures are decoded in a separate thread."""
Parse = Callable[[Mapping[bytes, bytes], bytes, ServingLimits], Query]


class App:
    """Answers requests for one model. Create and use it on the event loop."""

    def __init__(
        self, model: ServedModel, run: Run, num_threads: int, limits: ServerSettings, recorder: Recorder | None = None
    ):
        self.is_ready = True
        self._recorder = recorder
        self._feedback = partial(take_feedback, recorder, model) if recorder and limits.feedback else None
        self._model = model
        self._limits = limits
        self._num_pending = 0
        self._metrics_text = b""
        self._metrics_expire_at = 0.0
        self._large_requests: set[asyncio.Task[None]] = set()
        self._num_pixels = 0
        self._readers = [ThreadPoolExecutor(1, thread_name_prefix="reader") for _ in range(2)]
        self._batcher = MicroBatcher(
            run, batch_images=limits.batch_images, queue_images=limits.queue_images, num_threads=num_threads
        )
        self._read_seconds, self._predict_seconds, self._render_seconds = (
            histogram.labels(model.name) for histogram in (READ_SECONDS, PREDICT_SECONDS, RENDER_SECONDS)
        )
        self._page = page.page(model) if limits.page else None
        self._gets, self._posts = self._routes()
        PENDING_REQUESTS.set_function(lambda: self._num_pending)
        MODEL.info({"digest": model.digest, "version": model.version})

    def __call__(self, request: Request) -> None:
        """Answer the request, now or later."""
        parse = self._posts.get(request.path)
        get = self._gets.get(request.path)
        if parse is not None and request.method == "POST":
            self._predict(request, parse)
        elif self._feedback and request.path == FEEDBACK_PATH and request.method == "POST":
            request.answer(self._feedback(request))
        elif get is not None and request.method in ("GET", "HEAD"):
            is_for_people = request.path == "/" and b"text/html" in request.headers.get(b"accept", b"")
            request.answer(self._page if self._page and is_for_people else get())
        else:
            request.answer(self._not_here(request))

    def close(self) -> None:
        """Stop the threads after their current work."""
        for reader in self._readers:
            reader.shutdown(cancel_futures=True)
        self._batcher.close()

    def _routes(self) -> tuple[dict[str, Callable[[], Response]], dict[str, Parse]]:
        name, version, digest = self._model.name, self._model.version, self._model.digest
        models = partial(json_response, {"models": [name]})
        status = partial(self._status, name=name, model_version=version, model_digest=digest)
        server = {"name": "cifar10-server", "version": "1", "extensions": ["binary_tensor_data"]}
        metadata = {
            "name": name,
            "versions": [version],
            "platform": "onnxruntime_onnx",
            **v2.tensors(self._model.images),
            "properties": {"model_digest": digest, **self._model.properties},
            "picture_formats": ["PNG", "JPEG"],
        }
        gets: dict[str, Callable[[], Response]] = {
            "/": partial(json_response, {"status": "alive"}, headers=page.NEGOTIATED if self._page else ()),
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
            posts[f"/v1/models/{name}{suffix}:predict"] = partial(v1.parse, self._model)
            posts[f"/v2/models/{name}{suffix}/infer"] = partial(v2.parse, self._model)
        if self._page:
            posts[page.PREDICT_PATH] = partial(page.parse, self._model)
        return gets, posts

    def _metrics(self) -> Response:
        """The metrics, gathered a few times a second at most."""
        now = time.monotonic()
        if now > self._metrics_expire_at:
            self._metrics_text = generate_latest(REGISTRY)
            self._metrics_expire_at = now + _METRICS_SECONDS
        return Response(200, self._metrics_text, CONTENT_TYPE_LATEST)

    def _status(self, **model: str) -> Response:
        return json_response({**model, "ready": self.is_ready}, 200 if self.is_ready else 503)

    def _not_here(self, request: Request) -> Response:
        asked = f"{shorten(request.method)} {shorten(request.path)}"
        posts = {*self._posts, *([FEEDBACK_PATH] if self._feedback else [])}
        allowed = "GET, HEAD" if request.path in self._gets else "POST" if request.path in posts else None
        if allowed is not None:
            return json_response({"error": f"{asked}: Method Not Allowed."}, 405, (("Allow", allowed),))
        served = f"model {self._model.name}, version {self._model.version}"
        return json_response({"error": f"{asked}: Not Found. Served here: {served}; see /openapi.json."}, 404)

    def _predict(self, request: Request, parse: Parse) -> None:
        started = time.monotonic()
        self._num_pending += 1
        try:
            _check_room("requests", self._num_pending - 1, self._limits.max_pending_requests)
            self._batcher.check_room(1)
            query = None
            if len(request.body) <= self._limits.small_body_bytes:
                query = parse(request.headers, request.body, self._limits)
                if query.num_pixels <= self._limits.small_pixels:
                    self._submit(request, query.images(), query, started)
                    return
            _check_room("large requests", len(self._large_requests), self._limits.max_large_requests)
        except Exception as error:
            self._answer(request, error_response(error))
            return
        task = asyncio.get_running_loop().create_task(self._predict_large(request, parse, query, started))
        self._large_requests.add(task)  # the loop keeps only weak references
        task.add_done_callback(self._large_requests.discard)

    async def _predict_large(self, request: Request, parse: Parse, query: Query | None, started: float) -> None:
        loop = asyncio.get_running_loop()
        num_pixels = 0
        try:
            found = query or await loop.run_in_executor(self._readers[False], _parse, request, parse, self._limits)
            num_pixels = found.num_pixels
            self._num_pixels += num_pixels
            if self._num_pixels > self._limits.max_pending_pixels:
                limit = f"at most {self._limits.max_pending_pixels} pixels waiting to be decoded"
                raise BusyError(limit, self._num_pixels)
            reader = self._readers[num_pixels > _HUGE_PIXELS]
            images = await loop.run_in_executor(reader, _decode, request, found)
            self._submit(request, images, found, started)
        except Exception as error:
            self._answer(request, error_response(error))
        finally:
            self._num_pixels -= num_pixels

    def _submit(self, request: Request, images: Images, query: Query, started: float) -> None:
        submitted = time.monotonic()
        self._read_seconds.observe(submitted - started)

        def done(outcome: Logits | Exception) -> None:
            finished = time.monotonic()
            self._predict_seconds.observe(finished - submitted)
            try:
                if isinstance(outcome, Exception):
                    raise outcome
                response = query.render(outcome)
            except Exception as error:
                response = error_response(error)
            self._render_seconds.observe(time.monotonic() - finished)
            self._answer(request, response)
            if self._recorder and response.status == 200 and not isinstance(outcome, Exception):
                self._recorder.record(request, images, outcome, time.monotonic() - started)

        self._batcher.submit(images, done, lambda: request.is_wanted)

    def _answer(self, request: Request, response: Response) -> None:
        self._num_pending -= 1
        request.answer(response)
        if self._recorder:
            self._recorder.count(request, response.status)


def _parse(request: Request, parse: Parse, limits: ServingLimits) -> Query:
    if not request.is_wanted:
        raise GoneError
    return parse(request.headers, request.body, limits)


def _decode(request: Request, query: Query) -> Images:
    if not request.is_wanted:
        raise GoneError
    return query.images()


def _check_room(what: str, number: int, limit: int) -> None:
    if number >= limit:
        raise BusyError(f"at most {limit} {what} at a time", number)
