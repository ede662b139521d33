"""The door of the server: how much is let in at once, decided before a body is kept, and how it is left on shutdown."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import orjson
from prometheus_client import Counter, Gauge

from cifar_assets.serving.faults import BusyError, RequestError, shorten
from cifar_assets.serving.limits import ServingLimits

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

RESPONSES = Counter("cifar10_responses", "Answers by method and status.", ["method", "status"])
PENDING_REQUESTS = Gauge("cifar10_pending_requests", "Requests with a body being read or answered.")
PENDING_BYTES = Gauge("cifar10_pending_bytes", "Bytes of those bodies.")

_MAX_DISCARDED_BYTES = 64 * 1024 * 1024


class Admission:
    """ASGI middleware that reads each body within the limits and hands the application only complete ones.

    Requests without a body, health and metrics among them, pass at once. While `leaving` is set every answer asks its
    client to open a new connection.
    """

    def __init__(self, app: App, limits: ServingLimits, retry_after: Callable[[], int]):
        self._app = app
        self._limits = limits
        self._retry_after = retry_after
        self._num_requests = 0
        self._num_bytes = 0
        self.leaving = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        send = self._observed(scope, send)
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        held = _Held(self)
        try:
            try:
                held.enter()
                body = await self._read_body(headers, receive, held)
            except RequestError as error:
                if b"expect" not in headers and error.status != 408:
                    await _discard(receive)
                await send_error(send, error)
                return
            except ConnectionResetError:
                return
            await self._app(scope, _replay(body, receive), send)
        finally:
            held.leave()

    async def _read_body(self, headers: dict[bytes, bytes], receive: Receive, held: "_Held") -> bytes:
        encoding = headers.get(b"content-encoding", b"identity")
        if encoding != b"identity":
            raise RequestError("Content-Encoding", "an uncompressed body", shorten(encoding), status=415)
        declared = headers.get(b"content-length", b"")
        if declared.isdigit():
            held.grow_to(int(declared[:20]))
        chunks: list[bytes] = []
        num_bytes = 0
        try:
            async with asyncio.timeout(self._limits.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ConnectionResetError
                    chunk = message.get("body", b"")
                    num_bytes += len(chunk)
                    held.grow_to(num_bytes)
                    chunks.append(chunk)
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError as error:
            raise RequestError(
                "body", f"a whole body within {self._limits.body_timeout:g} seconds", f"{num_bytes} bytes", status=408
            ) from error

    def _observed(self, scope: Scope, send: Send) -> Send:
        async def observed_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                RESPONSES.labels(_method(scope), message["status"]).inc()
                if self.leaving:
                    message["headers"] = [*message.get("headers", []), (b"connection", b"close")]
            await send(message)

        return observed_send

    def add(self, num_requests: int, num_bytes: int) -> None:
        """Account for requests and bytes, or raise RequestError where they do not fit."""
        limits = self._limits
        if num_requests > 0 and self._num_requests + num_requests > limits.max_pending_requests:
            raise self._busy(f"at most {limits.max_pending_requests} requests at a time", f"{self._num_requests}")
        if num_bytes > 0 and self._num_bytes + num_bytes > limits.max_pending_bytes:
            raise self._busy(
                f"at most {limits.max_pending_bytes} bytes of requests at a time", f"{self._num_bytes} and more"
            )
        self._num_requests += num_requests
        self._num_bytes += num_bytes
        PENDING_REQUESTS.set(self._num_requests)
        PENDING_BYTES.set(self._num_bytes)

    def check_size(self, num_bytes: int) -> None:
        if num_bytes > self._limits.max_body_bytes:
            raise RequestError(
                "body", f"at most {self._limits.max_body_bytes} bytes", f"{num_bytes} or more", status=413
            )

    def _busy(self, expected: str, received: str) -> BusyError:
        return BusyError("server", expected, received, retry_after=self._retry_after())


class _Held:
    """What one request has been admitted for."""

    def __init__(self, admission: Admission):
        self._admission = admission
        self._num_requests = 0
        self._num_bytes = 0

    def enter(self) -> None:
        self._admission.add(1, 0)
        self._num_requests = 1

    def grow_to(self, num_bytes: int) -> None:
        self._admission.check_size(num_bytes)
        if num_bytes > self._num_bytes:
            self._admission.add(0, num_bytes - self._num_bytes)
            self._num_bytes = num_bytes

    def leave(self) -> None:
        self._admission.add(-self._num_requests, -self._num_bytes)
        self._num_requests = self._num_bytes = 0


def _method(scope: Scope) -> str:
    """The method as a label: a client may send any word as one, and each label is kept for good."""
    return scope["method"] if scope["method"] in ("GET", "HEAD", "POST", "OPTIONS") else "other"


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body once, then what the connection gives."""
    given = False

    async def replaying_receive() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replaying_receive


async def _discard(receive: Receive) -> None:
    """Let the client finish sending, within bounds: one that is still sending does not read the answer."""
    num_bytes = 0
    try:
        async with asyncio.timeout(10):
            while num_bytes < _MAX_DISCARDED_BYTES:
                message = await receive()
                num_bytes += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


async def send_error(send: Send, error: RequestError) -> None:
    """Answer a request with its fault."""
    body = orjson.dumps(error.body())
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
    if error.status in (408, 413):
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
