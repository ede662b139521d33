"""Connections over real sockets: what is read, within which limits, and who goes when there is no room."""

import asyncio
import json
import re
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, cast

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from cifar_assets.serving.answers import Response, json_response
from cifar_assets.serving.http import HttpServer, Request, State
from cifar_assets.serving.settings import ServingLimits

GET = b"GET /a?b=c HTTP/1.1\r\nHost: x\r\n\r\n"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """One connection to the server under test."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self, *, has_body: bool = True) -> Answer:
        head = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode().splitlines()
        headers = dict(line.lower().split(": ", 1) for line in lines if line)
        body = await self.reader.readexactly(int(headers["content-length"])) if has_body else b""
        return Answer(int(first.split()[1]), headers, body)

    async def ask(self, data: bytes) -> Answer:
        self.send(data)
        return await self.answer()

    async def is_closed(self) -> bool:
        try:
            return await self.reader.read(1) == b""
        except ConnectionResetError:
            return True


class Server:
    """An HttpServer whose application tells what it got, at once or when it is let."""

    def __init__(self, **limits: Any):
        self.limits = ServingLimits(**limits)
        self.http = HttpServer(self._app, self.limits)
        self.held: list[Request] | None = None
        self.port = 0

    def _app(self, request: Request) -> None:
        if self.held is None:
            self.answer(request)
        else:
            self.held.append(request)

    def answer(self, request: Request) -> None:
        headers = {name.decode(): value.decode("latin-1") for name, value in request.headers.items()}
        seen = {"method": request.method, "path": request.path, "bytes": len(request.body), "headers": headers}
        request.answer(json_response(seen))

    async def connect(self) -> Client:
        return Client(*await asyncio.open_connection("127.0.0.1", self.port, limit=1 << 24))

    async def until(self, condition: Callable[[], bool]) -> None:
        for _ in range(20_000):
            if condition():
                return
            await asyncio.sleep(0.01)
        raise AssertionError("the condition did not become true")


def story(tell: Callable[[Server], Awaitable[None]], **limits: Any) -> None:
    """Run a test's story against a server on loopback; whatever it did, nothing is held afterwards."""

    async def run() -> None:
        server = Server(**limits)
        server.http.sweep()
        listening = await asyncio.get_running_loop().create_server(server.http.connect, "127.0.0.1", 0)
        server.port = listening.sockets[0].getsockname()[1]
        await tell(server)
        for request in server.held or []:
            server.answer(request)
        server.http.abort()
        await server.until(lambda: not server.http.connections and server.http.num_held == 0)
        listening.close()

    uvloop.run(asyncio.wait_for(run(), 300))


class Clock:
    """The server's time, which only the test moves: on a busy machine nobody runs out of it."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("cifar_assets.serving.http.time", clock)
    monkeypatch.setattr("cifar_assets.serving.http._SWEEP_SECONDS", 0.01)
    return clock


def post(body: bytes, *headers: str) -> bytes:
    lines = ["POST / HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def chunked(*chunks: bytes) -> bytes:
    pieces = [f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n" for chunk in chunks]
    return b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(pieces)


def test_requests_of_one_connection_are_answered_in_order() -> None:
    async def tell(server: Server) -> None:
        client = await server.connect()
        answer = await client.ask(GET)
        assert (answer.status, answer.json["method"], answer.json["path"]) == (200, "GET", "/a")
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["date"]
        assert (await client.ask(post(b"abc"))).json["bytes"] == 3
        assert (await client.ask(chunked(b"ab", b"cde", b""))).json["bytes"] == 5

    story(tell)


def test_a_request_that_comes_byte_by_byte_is_read() -> None:
    async def tell(server: Server) -> None:
        client = await server.connect()
        for byte in post(b"hello", "X-Long: value"):
            client.send(bytes([byte]))
            await asyncio.sleep(0)
        answer = await client.answer()
        assert (answer.json["bytes"], answer.json["headers"]["x-long"]) == (5, "value")

    story(tell)


def test_requests_sent_before_the_answer_end_the_connection_after_it() -> None:
    async def tell(server: Server) -> None:
        for rest in (GET, GET[:10], b"nonsense", GET * 5000):
            client = await server.connect()
            answer = await client.ask(post(b"abc") + rest)
            assert (answer.json["bytes"], answer.headers["connection"]) == (3, "close")
            assert await client.is_closed()
        server.held = []
        client = await server.connect()
        client.send(GET)
        await server.until(lambda: bool(server.held))
        (connection,) = server.http.connections
        client.send(GET)
        await server.until(lambda: connection._is_ahead)
        server.answer(server.held.pop())
        assert (await client.answer()).headers["connection"] == "close"
        assert await client.is_closed()

    story(tell)


@pytest.mark.parametrize(
    ("head", "keeps"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", False),
        (b"GET / HTTP/1.0\r\n\r\n", False),
        (b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", True),
    ],
)
def test_a_connection_is_kept_as_the_client_asks(head, keeps) -> None:
    async def tell(server: Server) -> None:
        client = await server.connect()
        answer = await client.ask(head)
        assert answer.headers.get("connection") == ("keep-alive" if keeps else "close")
        if keeps:
            assert (await client.ask(GET)).status == 200
        else:
            assert await client.is_closed()

    story(tell)


def test_head_has_the_headers_of_get_and_no_body() -> None:
    async def tell(server: Server) -> None:
        client = await server.connect()
        client.send(GET.replace(b"GET", b"HEAD"))
        answer = await client.answer(has_body=False)
        assert int(answer.headers["content-length"]) > 50
        assert (await client.ask(GET)).status == 200

    story(tell)


def test_expect_100_continue_is_answered() -> None:
    async def tell(server: Server) -> None:
        client = await server.connect()
        head, _, body = post(b"abc", "Expect: 100-continue").partition(b"\r\n\r\n")
        client.send(head + b"\r\n\r\n")
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert (await client.ask(body)).json["bytes"] == 3
        client.send(b"POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 11\r\n\r\n")
        assert (await client.answer()).status == 413

    story(tell, max_body_bytes=10)


def test_protocol_upgrade_request_is_ignored() -> None:
    """Java's client sends it with every first request."""

    async def tell(server: Server) -> None:
        upgrade = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAAB")
        client = await server.connect()
        for body in (b"", b"abc", b"x" * 100_000):
            assert (await client.ask(post(body, *upgrade))).json["bytes"] == len(body)
        client.send(b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = await client.answer()
        assert (answer.status, "CONNECT" in answer.json["error"]) == (400, True)

    story(tell)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET\r\n\r\n",
        b"A" * 100_000,
        b"GET / HTTP/1.1\r\nbad header\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
        b"POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_invalid_http_gets_a_json_error_and_closes_the_connection(data) -> None:
    async def tell(server: Server) -> None:
        client = await server.connect()
        answer = await client.ask(data)
        assert answer.status == 400
        assert answer.headers["content-type"] == "application/json"
        assert answer.json["expected"] == "an HTTP/1.1 request"
        assert answer.headers["connection"] == "close"
        assert await client.is_closed()

    story(tell)


@pytest.mark.parametrize(
    "data",
    [
        b"GET /" + b"x" * 20_000,
        b"GET / HTTP/1.1\r\nX-Endless: " + b"x" * 20_000,
        b"GET / HTTP/1.1\r\n" + b"x" * 20_000,
        b"GET / HTTP/1.1\r\nX-Long: " + b"x" * 20_000 + b"\r\n\r\n",
        b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X-Many: 1\r\n" * 101 + b"\r\n",
        chunked(b"a") + b"0\r\n" + b"X-Trailer: 1\r\n" * 101 + b"\r\n",
    ],
)
def test_headers_over_the_limits_are_refused(data) -> None:
    async def tell(server: Server) -> None:
        client = await server.connect()
        answer = await client.ask(data)
        assert (answer.status, answer.json["field"]) == (431, "headers")
        assert await client.is_closed()

    story(tell)


@pytest.mark.parametrize(
    "data",
    [
        post(b"x" * 11),
        chunked(b"x" * 6, b"x" * 5),
        b"POST / HTTP/1.1\r\nContent-Length: 9999999999999999999\r\n\r\n",
    ],
)
def test_a_body_over_the_limit_is_refused(data) -> None:
    async def tell(server: Server) -> None:
        client = await server.connect()
        answer = await client.ask(data)
        assert (answer.status, answer.json["field"]) == (413, "body")
        assert answer.json["expected"] == "at most 10 bytes"
        assert await client.is_closed()
        assert (await (await server.connect()).ask(post(b"x" * 10))).json["bytes"] == 10

    story(tell, max_body_bytes=10)


def test_the_refusal_reaches_a_client_that_is_still_sending() -> None:
    async def tell(server: Server) -> None:
        client = await server.connect()
        client.send(post(bytes(20_000_000)))
        await client.writer.drain()
        assert (await client.answer()).status == 413

    story(tell)


def test_a_compressed_body_is_refused() -> None:
    async def tell(server: Server) -> None:
        client = await server.connect()
        answer = await client.ask(post(b"x", "Content-Encoding: gzip"))
        assert (answer.status, answer.json["field"]) == (415, "Content-Encoding")

    story(tell)


@pytest.mark.parametrize(
    "endless",
    [
        pytest.param(b"a" * 50_000, id="a chunk extension"),
        pytest.param(b"\r\n" * 30_000, id="a chunk size that never comes"),
        pytest.param(b"1;ext=1\r\nx\r\n" * 5_000, id="chunks that are mostly framing"),
    ],
)
def test_framing_without_end_is_refused(endless) -> None:
    async def tell(server: Server) -> None:
        client = await server.connect()
        client.send(chunked() + (b"1;" if endless.startswith(b"a") else b""))
        try:
            for _ in range(40):
                client.send(endless)
                await client.writer.drain()
        except ConnectionError:
            pass
        assert (await client.answer()).status == 400
        assert server.http.num_held == 0

    story(tell)


@pytest.mark.parametrize(
    ("first", "status"),
    [
        (b"GET / HTTP/1.1\r\nX-Slow: ", 408),
        (b"GET /", 408),
        (post(b"x" * 100)[:-50], 408),
        (post(b"x" * 100_000)[:-50], 408),
        (chunked(b"abc"), 408),
    ],
)
def test_slow_client_is_disconnected_even_if_it_keeps_sending(first, status, clock) -> None:
    async def tell(server: Server) -> None:
        client = await server.connect()
        client.send(first)
        await server.until(lambda: any(other.state is not State.IDLE for other in server.http.connections))
        for _ in range(40):
            await asyncio.sleep(0.01)
            client.send(b"0" if first.endswith(b"\r\n") else b"x")
            clock.now += 0.05
        answer = await client.answer()
        assert answer.status == status
        assert answer.json["error"]
        assert server.http.num_held == 0

    story(tell, header_timeout=0.3, body_timeout=0.6)


def test_a_body_that_stalls_is_given_up_before_its_time_is_over() -> None:
    async def tell(server: Server) -> None:
        client = await server.connect()
        assert (await client.ask(post(b"x" * 100)[:-50])).status == 408

    story(tell, stall_timeout=0.3)


def test_a_connection_without_a_request_is_closed(clock) -> None:
    async def tell(server: Server) -> None:
        silent, kept = await server.connect(), await server.connect()
        assert (await kept.ask(GET)).status == 200
        clock.now += 0.4
        assert await silent.is_closed()
        assert await kept.is_closed()

    story(tell, idle_timeout=0.3, header_timeout=0.3)


def test_a_connection_that_never_sends_has_the_time_for_headers_only() -> None:
    async def tell(server: Server) -> None:
        assert await (await server.connect()).is_closed()

    story(tell, header_timeout=0.3)


def test_a_last_answer_does_not_wait_for_the_client_to_close() -> None:
    async def tell(server: Server) -> None:
        client = await server.connect()
        assert (await client.ask(GET.replace(b"Host", b"Connection: close\r\nHost"))).status == 200
        await server.until(lambda: not server.http.connections)

    story(tell, stall_timeout=60)


def test_input_before_the_answer_is_bounded() -> None:
    async def tell(server: Server) -> None:
        server.held = []
        client = await server.connect()
        client.send(GET)
        await server.until(lambda: bool(server.held))
        client.send(bytes(50_000_000))
        await asyncio.sleep(0.3)
        assert cast(asyncio.WriteTransport, client.writer.transport).get_write_buffer_size() > 10_000_000
        server.answer(server.held.pop())
        assert (await client.answer()).headers["connection"] == "close"
        assert await client.is_closed()

    story(tell)


def test_a_client_that_does_not_read_is_cut_off() -> None:
    async def tell(server: Server) -> None:
        request = post(b"", f"X-Echo: {'x' * 10_000}")

        async def flood() -> None:
            while True:
                await asyncio.get_running_loop().sock_sendall(connection, request)

        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.setblocking(False)
            with pytest.raises(ConnectionError):
                await flood()
        await server.until(lambda: not server.http.connections)

    story(tell, stall_timeout=0.3)


def test_a_new_connection_takes_the_place_of_the_one_that_waited_longest() -> None:
    async def tell(server: Server) -> None:
        clients = [await server.connect() for _ in range(4)]
        for client in clients:
            assert (await client.ask(GET)).status == 200
        server.held = []
        clients[0].send(post(b"x"))
        await server.until(lambda: bool(server.held))
        clients[1].send(post(b"xy")[:-1])
        await server.until(lambda: any(connection.state.name == "BODY" for connection in server.http.connections))
        late = await server.connect()
        late.send(GET)
        assert await clients[2].is_closed()
        await server.until(lambda: len(server.held or []) == 2)
        later = await server.connect()
        assert await clients[3].is_closed()
        latest = await server.connect()
        assert (await clients[1].answer()).status == 408
        for request in server.held:
            server.answer(request)
        server.held = None
        assert (await clients[0].answer()).json["bytes"] == 1
        assert (await late.answer()).status == 200
        for client in (later, latest):
            assert (await client.ask(GET)).status == 200

    story(tell, max_connections=4)


def test_one_connection_too_many_is_refused_while_all_others_are_busy() -> None:
    async def tell(server: Server) -> None:
        server.held = []
        first = await server.connect()
        first.send(GET)
        await server.until(lambda: bool(server.held))
        client = await server.connect()
        answer = await client.answer()
        assert (answer.status, answer.headers["retry-after"]) == (429, "1")
        assert await client.is_closed()

    story(tell, max_connections=1)


def test_an_announced_body_holds_nothing() -> None:
    async def tell(server: Server) -> None:
        announced = [await server.connect() for _ in range(5)]
        for client in announced:
            client.send(b"POST / HTTP/1.1\r\nContent-Length: 16777216\r\n\r\n")
        client = await server.connect()
        assert (await client.ask(post(bytes(10_000_000)))).json["bytes"] == 10_000_000
        assert (await client.ask(post(b"x"))).status == 200

    story(tell)


def test_large_bodies_share_their_room_and_small_ones_do_not_need_it(clock) -> None:
    async def tell(server: Server) -> None:
        first = await server.connect()
        first.send(post(bytes(900))[:-10])
        await server.until(lambda: server.http.num_held > 700)
        second = await server.connect()
        answer = await second.ask(post(bytes(900)))
        assert (answer.status, answer.headers["retry-after"]) == (429, "1")
        assert (await (await server.connect()).ask(post(bytes(100)))).status == 200
        first.send(bytes(10))
        assert (await first.answer()).json["bytes"] == 900
        assert (await (await server.connect()).ask(post(bytes(900)))).status == 200

    story(tell, small_body_bytes=100, max_pending_bytes=1000)


def test_a_large_body_that_takes_long_makes_room_for_another(monkeypatch) -> None:
    monkeypatch.setattr("cifar_assets.serving.http._YOUNG_BODY_SECONDS", 0.0)

    async def tell(server: Server) -> None:
        first = await server.connect()
        first.send(post(bytes(900))[:-10])
        await server.until(lambda: server.http.num_held > 700)
        assert (await (await server.connect()).ask(post(bytes(900)))).json["bytes"] == 900
        assert (await first.answer()).status == 408

    story(tell, small_body_bytes=100, max_pending_bytes=1000)


def test_a_body_is_held_until_its_request_is_answered_though_the_client_has_gone() -> None:
    async def tell(server: Server) -> None:
        server.held = []
        client = await server.connect()
        client.send(post(bytes(900)))
        await server.until(lambda: bool(server.held))
        (request,) = server.held
        client.writer.transport.abort()
        await server.until(lambda: not request.is_wanted)
        assert server.http.num_held == 800
        server.held = None
        server.answer(request)
        assert server.http.num_held == 0

    story(tell, small_body_bytes=100)


def test_a_connection_keeps_no_body_beside_its_request() -> None:
    async def tell(server: Server) -> None:
        server.held = []
        client = await server.connect()
        client.send(post(bytes(100_000)))
        await server.until(lambda: bool(server.held))
        (connection,) = server.http.connections
        assert not connection._body
        server.answer(server.held.pop())
        assert (await client.answer()).json["bytes"] == 100_000
        assert not connection._body
        client.send(chunked(bytes(100_000), bytes(100_000)))
        assert (await client.answer()).status == 413
        assert connection in server.http.connections
        assert not connection._body

    story(tell, max_body_bytes=150_000)


@pytest.mark.parametrize("is_stuck", [True, False])
def test_an_evicted_client_that_does_not_read_keeps_no_socket(is_stuck) -> None:
    async def tell(server: Server) -> None:
        server.held = []
        client = await server.connect()
        cast(asyncio.Transport, client.writer.transport).pause_reading()
        client.send(GET)
        await server.until(lambda: bool(server.held))
        (connection,) = server.http.connections
        if not is_stuck:
            connection.transport.set_write_buffer_limits(1 << 30)
        server.held.pop().answer(Response(200, bytes(20_000_000)))
        server.held = None
        assert (await (await server.connect()).ask(GET)).status == 200
        assert connection not in server.http.connections
        await server.until(lambda: not server.http.evicted)

    story(tell, max_connections=1, stall_timeout=60 if is_stuck else 0.3)


def test_answers_close_their_connections_during_the_drain() -> None:
    async def tell(server: Server) -> None:
        clients = [await server.connect() for _ in range(3)]
        assert (await clients[0].ask(GET)).status == 200
        server.http.is_leaving = True
        for client, data in zip(clients, (GET, post(b"x"), b"nonsense\r\n\r\n"), strict=True):
            assert (await client.ask(data)).headers["connection"] == "close"
            assert await client.is_closed()

    story(tell)


def test_every_answer_has_the_clients_request_id_or_a_new_one() -> None:
    async def tell(server: Server) -> None:
        client = await server.connect()
        assert (await client.ask(post(b"x", "X-Request-Id: Root=1-67:ab/c;d@e.f_+"))).headers[
            "x-request-id"
        ] == "root=1-67:ab/c;d@e.f_+"  # the test's client lowers whole lines
        found = [(await client.ask(data)).headers["x-request-id"] for data in (GET, GET)]
        for invalid in ("", "a b", "a" * 129, "<script>", "\u00e4"):
            found.append((await client.ask(post(b"x", f"X-Request-Id: {invalid}"))).headers["x-request-id"])
        found.append((await client.ask(b"nonsense\r\n\r\n")).headers["x-request-id"])
        assert len(set(found)) == len(found)
        assert all(re.fullmatch("[0-9a-f]{32}", each) for each in found)

    story(tell)


def test_a_refused_request_keeps_its_id() -> None:
    async def tell(server: Server) -> None:
        answer = await (await server.connect()).ask(post(bytes(100), "X-Request-Id: abc"))
        assert (answer.status, answer.headers["x-request-id"]) == (413, "abc")

    story(tell, max_body_bytes=10)


HEADS = st.sampled_from([GET, post(b"abc"), chunked(b"abc", b""), post(b"", "Upgrade: h2c", "Connection: upgrade")])


@pytest.mark.fuzz
@given(
    data=st.binary(max_size=400)
    | st.builds(
        lambda head, position, value: head[:position] + value + head[position:],
        HEADS,
        st.integers(0, 100),
        st.binary(min_size=1, max_size=8),
    )
    | st.lists(HEADS, max_size=5).map(b"".join),
    cut=st.integers(0, 400),
)
def test_any_bytes_are_answered_or_waited_for(data, cut) -> None:
    async def tell(server: Server) -> None:
        client = await server.connect()
        client.send(data[:cut])
        await asyncio.sleep(0)
        client.send(data[cut:])
        client.writer.write_eof()
        received = await client.reader.read()
        assert not received or received.startswith(b"HTTP/1.1 ")
        assert b" 500 " not in received
        assert (await (await server.connect()).ask(GET)).status == 200

    story(tell)
