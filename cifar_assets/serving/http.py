"""HTTP/1.1 on asyncio: reads requests within limits, passes them to the application and writes the answers.

The bytes are parsed by httptools (llhttp, the parser of Node.js). This module adds what a public server needs: size
limits that start with the first header byte, time limits, and a rule for which connection is closed when there is no
room. A connection has one request at a time. If the client sends the next one early, the connection closes after the
answer.
"""

import asyncio
import enum
import http
import math
import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from email.utils import formatdate
from typing import cast
from urllib.parse import unquote

import httptools

from cifar_assets.serving.answers import BusyError, RequestError, Response, error_response, shorten
from cifar_assets.serving.metrics import CONNECTIONS, PENDING_BYTES, RESPONSES
from cifar_assets.serving.settings import ServingLimits

_FRAMING_BYTES = 512 * 1024
"""Bytes allowed in addition to the body: headers, one read of the socket, and the framing of chunks."""
_DISCARDED_BYTES = 64 * 1024 * 1024
_YOUNG_BODY_SECONDS = 2.0
_SWEEP_SECONDS = 0.25
_REQUEST_ID = re.compile(rb"[\w.:;=+/@-]{1,128}")
_UPGRADE_HEADERS = (b"connection", b"upgrade", b"http2-settings")
_METHODS = ("GET", "HEAD", "POST")
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n" for status in http.HTTPStatus}


@dataclass(slots=True, eq=False)
class Request:
    """A complete request. The application calls `answer` exactly once, even if the client has disconnected."""

    answer: Callable[[Response], None]
    method: str
    path: str
    headers: dict[bytes, bytes]
    """Names are lowercase."""
    body: bytes
    keep_alive: bool
    is_wanted: bool = True
    """False once its client has gone."""
    id: str = ""
    """The client's `X-Request-Id` if that is valid, otherwise a random one. The answer has it too."""


class State(enum.Enum):
    """What a connection is waiting for."""

    IDLE = 0
    HEAD = 1
    BODY = 2
    ANSWER = 3
    CLOSE = 4


class HttpServer:
    """State shared by all connections: the application, the limits, and their current use."""

    def __init__(self, app: Callable[[Request], None], limits: ServingLimits):
        self.app = app
        self.limits = limits
        self.seconds = {
            State.IDLE: limits.idle_timeout,
            State.HEAD: limits.header_timeout,
            State.BODY: min(limits.stall_timeout, limits.body_timeout),
            State.ANSWER: math.inf,
            State.CLOSE: limits.stall_timeout,
        }
        self.connections: set[Connection] = set()
        self.evicted: set[Connection] = set()
        """Connections closed to make room that still have data to send."""
        self.num_held = 0
        """Bytes of large bodies, complete or not."""
        self.is_leaving = False
        """Set during shutdown: every answer then closes its connection."""
        self.date = formatdate(usegmt=True)
        CONNECTIONS.set_function(lambda: len(self.connections))
        PENDING_BYTES.set_function(lambda: self.num_held)

    def connect(self) -> "Connection":
        return Connection(self)

    def admit(self, connection: "Connection") -> None:
        """Make room for a connection by closing the one that has waited longest for its client. Raises BusyError."""
        if len(self.connections) >= self.limits.max_connections:
            limit = f"at most {self.limits.max_connections} connections"
            self._evict_oldest((other for other in self.connections if other.state is not State.ANSWER), limit)
        self.connections.add(connection)

    def hold(self, connection: "Connection", num_bytes: int) -> None:
        """Make room for more of a large body, if need be by closing the oldest slow upload. Raises BusyError."""
        limit = f"at most {self.limits.max_pending_bytes} bytes of large requests at a time"
        while self.num_held + num_bytes > self.limits.max_pending_bytes:
            latest = time.monotonic() - _YOUNG_BODY_SECONDS
            uploads = (other for other in self.connections if other.state is State.BODY and other.num_held)
            self._evict_oldest((other for other in uploads if other is not connection and other.since < latest), limit)
        self.num_held += num_bytes

    def _evict_oldest(self, candidates: Iterable["Connection"], limit: str) -> None:
        oldest = min(candidates, key=lambda connection: connection.since, default=None)
        if oldest is None:
            raise BusyError(limit, "more")
        oldest.evict()

    def sweep(self) -> None:
        """Close connections whose time limit has passed, and schedule the next sweep."""
        asyncio.get_running_loop().call_later(_SWEEP_SECONDS, self.sweep)
        now = time.monotonic()
        self.date = formatdate(usegmt=True)
        for connection in [other for other in (*self.connections, *self.evicted) if other.deadline < now]:
            connection.expire()

    def close_idle(self) -> None:
        """Close every connection that is between two requests."""
        for connection in [other for other in self.connections if other.state is State.IDLE]:
            connection.evict()

    def abort(self) -> None:
        """Close every connection at once."""
        for connection in list(self.connections):
            connection.transport.abort()


class Connection(asyncio.Protocol):
    """One client's connection. Times are from `time.monotonic`."""

    transport: asyncio.Transport

    def __init__(self, server: HttpServer):
        self.num_held = 0
        """Bytes of the body that count toward the server's limit."""
        self._server = server
        self._limits = server.limits
        self._parser = httptools.HttpRequestParser(self)
        self._request: Request | None = None
        self._is_stuck = False
        """Whether the client has stopped reading."""
        self._is_ahead = False
        """Whether the client sent more than the request that is being answered."""
        self._num_received = 0
        self._begin()
        self._enter(State.IDLE)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(
            asyncio.Transport, transport
        )  # uvloop's transport has these methods but not the base class
        try:
            self._server.admit(self)
            self.deadline = self.since + self._limits.header_timeout
        except BusyError as error:
            self._write(error_response(error))
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self._server.evicted.discard(self)
        if self._request is not None:
            self._request.is_wanted = False
        else:
            self._release()
        self.state = State.CLOSE

    def pause_writing(self) -> None:
        self._is_stuck = True
        self.transport.pause_reading()
        self._enter(self.state)

    def resume_writing(self) -> None:
        self._is_stuck = False
        self.transport.resume_reading()
        self._enter(self.state)

    def data_received(self, data: bytes) -> None:
        if self.state is State.ANSWER:  # the next request comes before the answer
            self._is_ahead = True
            self.transport.pause_reading()
            return
        if self.state is State.CLOSE:
            self._num_received += len(data)
            if self._num_received > _DISCARDED_BYTES:
                self.transport.abort()
            return
        if self.state is State.IDLE:
            self._num_received = 0
        self._num_received += len(data)
        fault = self._parse(data)
        if self._request is not None:
            self._is_ahead = fault is not None
            self._server.app(self._request)
        elif fault is not None:
            self._close(error_response(fault), is_sending=True)

    def expire(self) -> None:
        """The time limit of the connection's current state has passed."""
        if self.state is State.CLOSE or self._is_stuck:
            self.transport.abort()
        else:
            self._close(self._too_slow(), is_sending=self.state is not State.IDLE)

    def evict(self) -> None:
        """Close now, to make room for others."""
        self._server.connections.discard(self)
        self._server.evicted.add(self)
        self._release()
        response = self._too_slow()
        self._enter(State.CLOSE)
        if self._is_stuck:
            self.transport.abort()
            return
        if response is not None:
            self._write(response)
        self.transport.close()

    def _parse(self, data: bytes) -> BaseException | None:
        """Feed the parser, which calls the methods below. Returns what is wrong with the bytes."""
        try:
            self._parser.feed_data(data)
            if self.state is State.HEAD:
                _check_size("headers", self._num_received, self._limits.max_header_bytes, 431)
            elif self.state is State.BODY and self._num_received > _FRAMING_BYTES + len(self._body) * 9 // 8:
                raise RequestError("body", "chunks that carry data", "mostly framing")
        except httptools.HttpParserUpgrade as upgrade:
            return self._ignore_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserCallbackError as error:
            return error.__context__  # raised by one of the methods below
        except httptools.HttpParserError as error:
            return RequestError("request", "an HTTP/1.1 request", f"bytes that are not one ({error})")
        except RequestError as error:
            return error
        return None

    def _ignore_upgrade(self, rest: bytes) -> BaseException | None:
        """Ignore a request to upgrade the protocol, as RFC 9110 allows."""
        method = self._parser.get_method()
        if method == b"CONNECT":
            return RequestError("request", "a request to this server", "CONNECT, which asks for a proxy")
        headers = [name + b": " + value for name, value in self._headers.items() if name not in _UPGRADE_HEADERS]
        self._parser = httptools.HttpRequestParser(self)
        return self._parse(b"\r\n".join([method + b" " + bytes(self._url) + b" HTTP/1.1", *headers, b"", rest]))

    def on_message_begin(self) -> None:
        if self._request is not None:
            raise RequestError("request", "one request at a time", "the next before the answer")
        self._begin()
        self._enter(State.HEAD)

    def on_url(self, part: bytes) -> None:
        self._url += part

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_headers += 1
        self._num_head_bytes += len(name) + len(value) + 4
        if self._num_headers > self._limits.max_headers:
            raise RequestError("headers", f"at most {self._limits.max_headers} headers", "more", status=431)
        _check_size("headers", self._num_head_bytes, self._limits.max_header_bytes, 431)
        if self.state is State.HEAD:  # later ones are trailers
            self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        _check_size("headers", self._num_head_bytes + len(self._url), self._limits.max_header_bytes, 431)
        if self._parser.should_upgrade():
            return
        self._enter(State.BODY)
        self._method = self._parser.get_method().decode()
        request_id = self._headers.get(b"x-request-id", b"")
        if _REQUEST_ID.fullmatch(request_id):
            self._id = request_id.decode()
        encoding = self._headers.get(b"content-encoding", b"identity")
        if encoding.lower() != b"identity":
            raise RequestError("Content-Encoding", "an uncompressed body", shorten(encoding), status=415)
        _check_size("body", int(self._headers.get(b"content-length", b"0")), self._limits.max_body_bytes, 413)
        if b"expect" in self._headers:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, part: bytes) -> None:
        self._body += part
        _check_size("body", len(self._body), self._limits.max_body_bytes, 413)
        num_more = len(self._body) - self._limits.small_body_bytes - self.num_held
        if num_more > 0:
            self._server.hold(self, num_more)
            self.num_held += num_more
        self.deadline = min(self.since + self._limits.body_timeout, time.monotonic() + self._limits.stall_timeout)

    def on_message_complete(self) -> None:
        if self._parser.should_upgrade():
            return
        path = _path(bytes(self._url))
        keep_alive = self._parser.should_keep_alive()
        self._request = Request(
            self._answer, self._method, path, self._headers, bytes(self._body), keep_alive, id=self._id
        )
        self._body = bytearray()  # the request has its own copy
        self._enter(State.ANSWER)

    def _begin(self) -> None:
        self._method = "other"
        self._id = secrets.token_hex(16)
        self._url = bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._body = bytearray()
        self._num_headers = self._num_head_bytes = 0

    def _too_slow(self) -> Response | None:
        """The timeout answer, if a request has begun."""
        faults = {
            State.HEAD: ("headers", f"all headers within {self._limits.header_timeout:g} seconds"),
            State.BODY: ("body", f"a whole body within {self._limits.body_timeout:g} seconds, without long pauses"),
        }
        fault = faults.get(self.state)
        return fault and error_response(RequestError(*fault, f"{self._num_received} bytes", status=408))

    def _answer(self, response: Response) -> None:
        self._release()
        request, self._request = self._request, None
        if request is None or not request.is_wanted:
            return
        if request.keep_alive and not self._is_ahead and not self._server.is_leaving:
            self._enter(State.IDLE)
            self._write(response, request.method, close=False)
        else:
            self._close(response, request.method, is_sending=self._is_ahead)

    def _close(self, response: Response | None, method: str = "other", *, is_sending: bool) -> None:
        """Send the last answer. Keep reading from the client for a while, otherwise it would get a connection reset."""
        self._release()
        self._enter(State.CLOSE)
        if response is not None:
            self._write(response, method)
        self._num_received = 0
        if not is_sending:
            self.transport.close()
        elif not self.transport.is_closing():
            self.transport.write_eof()
            if not self._is_stuck:
                self.transport.resume_reading()

    def _write(self, response: Response, method: str = "other", *, close: bool = True) -> None:
        # A client may send any word as a method, and metric labels are never removed.
        RESPONSES.labels(method if method in _METHODS else "other", response.status).inc()
        head = (
            f"{_STATUS_LINES[response.status]}Date: {self._server.date}\r\nContent-Type: {response.content_type}\r\n"
            f"Content-Length: {len(response.body)}\r\nConnection: {'close' if close else 'keep-alive'}\r\n"
            f"X-Request-Id: {self._id}\r\n"
        )
        more = "".join(f"{name}: {value}\r\n" for name, value in response.headers)
        encoded = f"{head}{more}\r\n".encode("latin-1")
        if not self.transport.is_closing():
            self.transport.write(encoded if method == "HEAD" else encoded + response.body)

    def _enter(self, state: State) -> None:
        self.state = state
        self.since = time.monotonic()
        self.deadline = self.since + (self._limits.stall_timeout if self._is_stuck else self._server.seconds[state])

    def _release(self) -> None:
        self._body = bytearray()
        self._server.num_held -= self.num_held
        self.num_held = 0


def _check_size(field: str, num_bytes: int, limit: int, status: int) -> None:
    if num_bytes > limit:
        raise RequestError(field, f"at most {limit} bytes", f"{num_bytes} or more", status=status)


def _path(url: bytes) -> str:
    """The decoded path of a request target, without query and final slash."""
    try:
        path = httptools.parse_url(url).path or b"/"
    except httptools.HttpParserInvalidURLError as error:
        raise RequestError("request", "an HTTP/1.1 request", f"the target {shorten(url)}") from error
    return unquote(path.decode("latin-1")).rstrip("/") or "/"
