"""HTTP/1.1 on asyncio: reads requests within limits, hands them to the application, answers them in order.

The bytes are parsed by httptools (llhttp, the parser of Node). What is added is what a server that strangers reach
needs: limits from the first byte of a header on, time limits, and a rule for what is closed when there is no room.
"""

import asyncio
import enum
import http
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from email.utils import formatdate
from typing import cast
from urllib.parse import unquote

import httptools
from prometheus_client import Counter

from cifar_assets.serving.answers import BusyError, RequestError, Response, error_response, shorten
from cifar_assets.serving.metrics import CONNECTIONS, PENDING_BYTES, RESPONSES
from cifar_assets.serving.settings import ServingLimits

_log = logging.getLogger(__name__)

_MAX_PIPELINED = 32
_FRAMING_BYTES = 512 * 1024
"""What may come with a message beside its body: one read of the socket, and the framing of chunks."""
_DISCARDED_BYTES = 64 * 1024 * 1024
_DISCARD_SECONDS = 5.0
_YOUNG_BODY_SECONDS = 2.0
_SWEEP_SECONDS = 0.25
_HOP_HEADERS = (b"connection", b"upgrade", b"http2-settings")
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in http.HTTPStatus}


@dataclass(slots=True, eq=False)
class Request:
    """A complete request. The application calls `answer` exactly once, also for one that is not wanted any more."""

    connection: "Connection"
    method: str
    path: str
    headers: dict[bytes, bytes]
    """Names in lower case."""
    body: bytes
    keep_alive: bool
    num_held: int
    is_wanted: bool = True
    """False once its client has gone."""

    def answer(self, response: Response) -> None:
        self.connection.answer(self, response)


class _Reading(enum.Enum):
    NOTHING = 0
    HEAD = 1
    BODY = 2


class HttpServer:
    """What all connections share: the application, the limits, and who holds how much of them."""

    def __init__(self, app: Callable[[Request], None], limits: ServingLimits):
        self.app = app
        self.limits = limits
        self.connections: set[Connection] = set()
        self.num_held = 0
        """Bytes of large bodies, complete or not."""
        self.is_leaving = False
        """Set on the way out: every answer then closes its connection."""
        self.date = formatdate(usegmt=True)
        self._counters: dict[tuple[str, int], Counter] = {}
        CONNECTIONS.set_function(lambda: len(self.connections))
        PENDING_BYTES.set_function(lambda: self.num_held)

    def connect(self) -> "Connection":
        return Connection(self)

    def admit(self, connection: "Connection") -> bool:
        """Make room for a new connection; False where every other one is being answered."""
        waiting = (other for other in self.connections if other.is_waiting)
        if len(self.connections) >= self.limits.max_connections and not self._evict_oldest(waiting):
            return False
        self.connections.add(connection)
        return True

    def hold(self, connection: "Connection", num_bytes: int) -> bool:
        """Make room for more of a large body, if need be by closing the oldest slow upload. False where that fails."""
        while self.num_held + num_bytes > self.limits.max_pending_bytes:
            latest = time.monotonic() - _YOUNG_BODY_SECONDS
            uploads = (other for other in self.connections if other.num_held and other.is_waiting)
            if not self._evict_oldest(other for other in uploads if other is not connection and other.since < latest):
                return False
        self.num_held += num_bytes
        return True

    def _evict_oldest(self, candidates: Iterable["Connection"]) -> bool:
        oldest = min(candidates, key=lambda connection: connection.since, default=None)
        if oldest is not None:
            oldest.evict()
        return oldest is not None

    def sweep(self) -> None:
        """Close connections that have run out of time, and schedule the next sweep."""
        now = time.monotonic()
        self.date = formatdate(usegmt=True)
        for connection in [other for other in self.connections if other.deadline < now]:
            connection.expire()
        asyncio.get_running_loop().call_later(_SWEEP_SECONDS, self.sweep)

    def close_idle(self) -> None:
        """Close every connection that is between two requests."""
        for connection in [other for other in self.connections if other.is_waiting]:
            if connection.reading is _Reading.NOTHING:
                connection.evict()

    def abort(self) -> None:
        """Close every connection at once."""
        for connection in list(self.connections):
            connection.abort()

    def count(self, method: str, status: int) -> None:
        # A client may send any word as a method, and each label is kept for good.
        key = (method if method in ("GET", "HEAD", "POST") else "other", status)
        counter = self._counters.get(key)
        if counter is None:
            counter = self._counters[key] = RESPONSES.labels(*key)
        counter.inc()


class Connection(asyncio.Protocol):
    """One client's connection. Times are of `time.monotonic`."""

    def __init__(self, server: HttpServer):
        self.reading = _Reading.NOTHING
        self.since = self.deadline = time.monotonic()
        self.num_held = 0
        """Bytes of an incomplete body that are accounted for in the server."""
        self._server = server
        self._limits = server.limits
        self._head_limit = f"at most {server.limits.max_header_bytes} bytes"
        self._transport: asyncio.Transport
        self._parser = httptools.HttpRequestParser(self)
        self._current: Request | None = None
        self._waiting: deque[Request | Response] = deque()
        self._fault: RequestError | None = None
        self._is_done_reading = False
        self._is_closing = False
        self._is_paused = False
        self._is_writing_paused = False
        self._num_discarded = 0
        self._num_received = 0
        self._begin_message()

    @property
    def is_waiting(self) -> bool:
        """Whether it is the client's turn: nothing of it is being answered."""
        return self._current is None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # what uvloop gives is one, without the base class
        if self._server.admit(self):
            self.deadline = self.since + self._limits.header_timeout
        else:
            limit = f"at most {self._limits.max_connections} connections"
            self._write(error_response(BusyError("server", limit, "one more", retry_after=1)), close=True)
            self._close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_done_reading = self._is_closing = True
        self._server.connections.discard(self)
        self._release_body()
        for item in self._waiting:
            self._release(item.num_held if isinstance(item, Request) else 0)
        self._waiting.clear()
        if self._current is not None:
            self._current.is_wanted = False

    def pause_writing(self) -> None:
        self._is_writing_paused = True
        self._set_deadline()

    def resume_writing(self) -> None:
        self._is_writing_paused = False
        self._set_deadline()
        self._pump()

    def data_received(self, data: bytes) -> None:
        if self._is_done_reading:
            self._num_discarded += len(data)
            if self._num_discarded > _DISCARDED_BYTES:
                self._transport.abort()
            return
        self._num_received += len(data)
        num_before = len(self._body)
        self._feed(data)
        if self.reading is _Reading.HEAD and self._num_received > self._limits.max_header_bytes:
            self._refuse_head(self._head_limit, f"{self._num_received} and no end")
        elif self.reading is _Reading.BODY:
            if self._num_received > _FRAMING_BYTES + len(self._body) * 9 // 8:
                self._fail(RequestError("body", "chunks that carry data", "mostly framing"))
            if len(self._body) > num_before:
                self._set_deadline()
        if self._fault is not None:
            self._refuse(self._fault)
        self._pump()
        if self._waiting and not self._is_paused and not self._is_closing:
            self._is_paused = True
            self._transport.pause_reading()

    def answer(self, request: Request, response: Response) -> None:
        """Send the answer to the request that is being worked on."""
        self._release(request.num_held)
        if request is not self._current or self._is_closing:
            return
        self._current = None
        self._server.count(request.method, response.status)
        is_last = not request.keep_alive or self._server.is_leaving
        self._write(response, close=is_last, request=request)
        if is_last:
            self._close()
        else:
            self._set_deadline()
            if self._waiting:
                asyncio.get_running_loop().call_soon(self._pump)

    def expire(self) -> None:
        """The time for what the connection is doing is over."""
        if self._is_closing or self._is_writing_paused:
            self._transport.abort()
        elif self.reading is _Reading.NOTHING:
            self._close()
        else:
            self._refuse(self._too_slow())
            self._pump()

    def abort(self) -> None:
        self._transport.abort()

    def evict(self) -> None:
        """Close now, to make room for others."""
        self._server.connections.discard(self)
        self._release_body()
        if self._is_closing or self._is_writing_paused:
            self._transport.abort()
            return
        if self.reading is not _Reading.NOTHING:
            self._write(error_response(self._too_slow()), close=True)
        self._close()

    # What the parser calls. They must not raise: a fault is kept, and the rest of the bytes ignored.

    def on_message_begin(self) -> None:
        if self._is_done_reading:
            return
        self._begin_message()
        self._enter(_Reading.HEAD)

    def on_url(self, part: bytes) -> None:
        self._url += part
        self._num_head_bytes += len(part)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_headers += 1
        self._num_head_bytes += len(name) + len(value) + 4
        if self._num_headers > self._limits.max_headers:
            self._refuse_head(f"at most {self._limits.max_headers} headers", "more")
        elif self._num_head_bytes > self._limits.max_header_bytes:
            self._refuse_head(self._head_limit, str(self._num_head_bytes))
        elif self.reading is _Reading.HEAD:  # later ones are trailers
            self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        if self._is_done_reading or self._fault is not None:
            return
        if self._num_head_bytes > self._limits.max_header_bytes:
            self._refuse_head(self._head_limit, str(self._num_head_bytes))
        if self._parser.should_upgrade():
            return
        self._enter(_Reading.BODY)
        self._method = self._parser.get_method().decode()
        headers = self._headers
        encoding = headers.get(b"content-encoding", b"identity")
        if encoding.lower() != b"identity":
            self._fail(RequestError("Content-Encoding", "an uncompressed body", shorten(encoding), status=415))
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > self._limits.max_body_bytes:
            self._refuse_body(declared[:20].decode())
        elif b"expect" in headers and self._fault is None and self._current is None and not self._waiting:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, part: bytes) -> None:
        if self._is_done_reading or self._fault is not None:
            return
        num_bytes = len(self._body) + len(part)
        if num_bytes > self._limits.max_body_bytes:
            self._refuse_body(f"{num_bytes} or more")
            return
        num_more = num_bytes - self._limits.small_body_bytes - self.num_held
        if num_more > 0:
            if not self._server.hold(self, num_more):
                limit = f"at most {self._limits.max_pending_bytes} bytes of large requests at a time"
                self._fail(BusyError("server", limit, f"{self._server.num_held} and more", retry_after=1))
                return
            self.num_held += num_more
        self._body += part

    def on_message_complete(self) -> None:
        if self._is_done_reading or self._fault is not None or self._parser.should_upgrade():
            return
        keep_alive = self._parser.should_keep_alive() and len(self._waiting) + 1 < _MAX_PIPELINED
        path = _path(bytes(self._url))
        self._waiting.append(
            Request(self, self._method, path, self._headers, bytes(self._body), keep_alive, self.num_held)
        )
        self._is_done_reading = not keep_alive
        self.num_held = self._num_received = 0
        self._begin_message()
        self._enter(_Reading.NOTHING)

    def _begin_message(self) -> None:
        self._method = "other"
        self._url = bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._body = bytearray()
        self._num_headers = self._num_head_bytes = 0

    def _feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            if not self._is_done_reading:
                self._fail(RequestError("request", "an HTTP/1.1 request", f"bytes that are not one ({error})"))

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Read a request that asks for another protocol as one that does not: servers may ignore that wish."""
        method = self._parser.get_method()
        if method == b"CONNECT":
            self._fail(RequestError("request", "a request to this server", "CONNECT, which asks for a proxy"))
        if self._fault is not None or self._is_done_reading:
            return
        headers = [(name, value) for name, value in self._headers.items() if name not in _HOP_HEADERS]
        lines = [method + b" " + bytes(self._url) + b" HTTP/1.1", *(name + b": " + value for name, value in headers)]
        self._parser = httptools.HttpRequestParser(self)
        self._feed(b"\r\n".join([*lines, b"", b""]) + rest)

    def _fail(self, fault: RequestError) -> None:
        self._fault = self._fault or fault

    def _refuse_head(self, expected: str, received: str) -> None:
        self._fail(RequestError("headers", expected, received, status=431))

    def _refuse_body(self, received: str) -> None:
        self._fail(RequestError("body", f"at most {self._limits.max_body_bytes} bytes", received, status=413))

    def _too_slow(self) -> RequestError:
        if self.reading is _Reading.HEAD:
            expected = f"all headers within {self._limits.header_timeout:g} seconds"
            return RequestError("headers", expected, f"{self._num_received} bytes", status=408)
        expected = f"a whole body within {self._limits.body_timeout:g} seconds, without long pauses"
        return RequestError("body", expected, f"{len(self._body)} bytes", status=408)

    def _refuse(self, fault: RequestError) -> None:
        """Read no further; send the fault once what came before it has been answered."""
        self._is_done_reading = True
        self._release_body()
        self._begin_message()
        self.reading = _Reading.NOTHING
        self._waiting.append(error_response(fault))

    def _pump(self) -> None:
        """Start on the next request where the last one is answered; one at a time, so that others have their turn."""
        if self._is_closing or self._current is not None or self._is_writing_paused:
            return
        item = self._waiting.popleft() if self._waiting else None
        if isinstance(item, Response):
            self._server.count(self._method, item.status)
            self._write(item, close=True)
            self._close(discard=True)
        elif item is not None:
            self._current = item
            self._set_deadline()
            self._server.app(item)
        if self._is_paused and not self._waiting and not self._is_closing:
            self._is_paused = False
            self._transport.resume_reading()

    def _write(self, response: Response, *, close: bool, request: Request | None = None) -> None:
        head = [_STATUS_LINES[response.status], "Date: ", self._server.date, "\r\nContent-Type: "]
        head += [response.content_type, "\r\nContent-Length: ", str(len(response.body)), "\r\n"]
        for name, value in response.headers:
            head += [name, ": ", value, "\r\n"]
        if close:
            head.append("Connection: close\r\n")
        elif request is not None and b"connection" in request.headers:  # HTTP/1.0 wants to read it
            head.append("Connection: keep-alive\r\n")
        head.append("\r\n")
        encoded = "".join(head).encode("latin-1")
        is_head = request is not None and request.method == "HEAD"
        self._transport.write(encoded if is_head else encoded + response.body)

    def _close(self, *, discard: bool = False) -> None:
        """Close once all is sent. `discard` reads on for a while: a client that is still sending would get a reset."""
        self._is_done_reading = self._is_closing = True
        self.since = time.monotonic()
        self.deadline = self.since + (_DISCARD_SECONDS if discard else self._limits.body_timeout)
        if discard and self._transport.can_write_eof():
            self._transport.write_eof()
            if self._is_paused:
                self._is_paused = False
                self._transport.resume_reading()
        else:
            self._transport.close()

    def _enter(self, reading: _Reading) -> None:
        self.reading = reading
        self.since = time.monotonic()
        self._set_deadline()

    def _set_deadline(self) -> None:
        if self._is_closing:
            return
        limits = self._limits
        now = time.monotonic()
        if self._is_writing_paused:
            self.deadline = now + limits.stall_timeout
        elif self._current is not None:
            self.deadline = math.inf
        elif self.reading is _Reading.HEAD:
            self.deadline = self.since + limits.header_timeout
        elif self.reading is _Reading.BODY:
            self.deadline = min(self.since + limits.body_timeout, now + limits.stall_timeout)
        else:
            self.since = now
            self.deadline = now + limits.idle_timeout

    def _release_body(self) -> None:
        self._release(self.num_held)
        self.num_held = 0

    def _release(self, num_bytes: int) -> None:
        self._server.num_held -= num_bytes


def _path(url: bytes) -> str:
    """The decoded path of a request target, without query and final slash."""
    path = url.partition(b"?")[0]
    if not path.startswith(b"/") and b"://" in path:
        path = b"/" + path.split(b"/", 3)[3] if path.count(b"/") > 2 else b"/"
    text = path.decode("latin-1")
    return (unquote(text) if "%" in text else text).rstrip("/") or "/"
