"""The server under load and during a drain: no request is lost, health answers, requests over the limits get 429."""

import contextlib
import http.client
import io
import json
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import pytest
from PIL import Image

from resources.object_store import FolderStore
from tests.fixtures.ports import free_port
from tests.unit.serving.server_process import PATIENT, Answer, ServerProcess, ask, ask_on, form, run_server
from tests.unit.serving.tiny_model import store_tiny_model

PREDICT = "/v1/models/cifar10:predict"
BODY = json.dumps({"instances": [np.zeros((32, 32, 3), int).tolist()]}).encode()
JSON = {"Content-Type": "application/json"}


HELD = """
import sys, time
from pathlib import Path
from cifar_assets.serving import app
from cifar_assets.serving.__main__ import main
from cifar_assets.serving.classifier import Classifier

def held(function, name):
    file = Path(sys.argv[1], f"hold-{name}")
    def call(*arguments):
        time.sleep(0.01)  # a model that is quicker than 2 ms runs on the event loop, which nothing may hold
        while file.exists():
            time.sleep(0.01)
        return function(*arguments)
    return call

Classifier.run = held(Classifier.run, "model")
app._decode = held(app._decode, "decoder")
sys.exit(main(sys.argv[2:]))
"""


@contextlib.contextmanager
def holdable_server(folder: Path, *options: str) -> Iterator[ServerProcess]:
    """A server of the tiny model for use with `held`."""
    model = store_tiny_model(FolderStore(folder / "models"))
    with run_server(*model, folder, *options, *PATIENT, program=("-c", HELD, str(folder))) as server:
        yield server


@contextlib.contextmanager
def held(server: ServerProcess, what: Literal["model", "decoder"]) -> Iterator[None]:
    """Blocks the server's model, or its decoder of large pictures, until the end of the block."""
    file = server.log_file.with_name(f"hold-{what}")
    file.touch()
    try:
        yield
    finally:
        file.unlink()


def predict(server: ServerProcess) -> Answer:
    return ask(server.port, "POST", PREDICT, BODY, JSON)


def metric(server: ServerProcess, name: str) -> float:
    lines = server.get("/metrics").body.decode().splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


def wait_for(condition: Callable[[], object], seconds: float = 300) -> None:
    """Waits for a lasting state, so polling may be slow."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def num_done(futures: Iterable[Future[Answer]]) -> int:
    return sum(future.done() for future in futures)


@pytest.fixture(scope="module")
def busy(tmp_path_factory) -> Iterator[ServerProcess]:
    with holdable_server(tmp_path_factory.mktemp("busy"), "--queue-images", "4", "--batch-images", "1") as server:
        yield server


def test_requests_over_the_limit_get_429_and_the_rest_are_answered(busy) -> None:
    with ThreadPoolExecutor(48) as pool:
        with held(busy, "model"):
            futures = [pool.submit(predict, busy)]
            wait_for(lambda: metric(busy, "cifar10_pending_requests") == 1)
            wait_for(lambda: metric(busy, "cifar10_queue_images") == 0)  # the model is running
            futures += [pool.submit(predict, busy) for _ in range(47)]
            wait_for(lambda: num_done(futures) >= 43)
        answers = [future.result() for future in futures]
    assert Counter(answer.status for answer in answers) == {200: 5, 429: 43}
    for answer in answers:
        if answer.status == 429:
            assert int(answer.headers["Retry-After"]) >= 1
            assert "got" in answer.json["error"]
    assert predict(busy).status == 200


def test_health_answers_while_requests_wait(busy) -> None:
    with ThreadPoolExecutor(4) as pool:
        with held(busy, "model"):
            futures = [pool.submit(predict, busy) for _ in range(4)]
            wait_for(lambda: metric(busy, "cifar10_queue_images") == 3)
            for path in ("/v2/health/live", "/v2/health/ready", "/v1/models/cifar10", "/metrics"):
                assert busy.get(path).status == 200
            assert num_done(futures) == 0
        assert [future.result().status for future in futures] == [200] * 4


def test_disconnecting_and_malformed_clients_do_no_harm(busy) -> None:
    request = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(BODY)}\r\n\r\n".encode()
    for data in (
        b"",
        b"\x16\x03\x01\x02\x00",
        b"GET\r\n\r\n",
        b"A" * 100_000,
        request,
        request + BODY[:100],
        request + BODY,
    ):
        with socket.create_connection(("127.0.0.1", busy.port), timeout=300) as connection:
            connection.sendall(data)
    wait_for(lambda: metric(busy, "cifar10_pending_requests") == 0)
    assert metric(busy, "cifar10_pending_bytes") == 0
    assert predict(busy).status == 200
    assert "Traceback" not in busy.log


def test_sigterm_drains_started_requests_and_rejects_new_ones(tmp_path) -> None:
    options = ("--batch-images", "1", "--linger", "300")
    with holdable_server(tmp_path, *options) as server, ThreadPoolExecutor(7) as pool:
        with contextlib.closing(server.connect()) as kept, contextlib.closing(server.connect()) as idle:
            for connection in (kept, idle):
                assert ask_on(connection, "GET", "/v1/models/cifar10").status == 200
            with held(server, "model"):
                futures = [pool.submit(predict, server) for _ in range(6)]
                wait_for(lambda: metric(server, "cifar10_pending_requests") == 6)
                server.process.send_signal(signal.SIGTERM)
                wait_for(lambda: is_refused(server.port))
                last = pool.submit(ask_on, kept, "POST", PREDICT, BODY, JSON)
            assert (last.result().status, last.result().headers["Connection"]) == (200, "close")
            assert [future.result().status for future in futures] == [200] * 6
        assert server.process.wait(300) == 0


def test_readiness_fails_during_the_drain_delay(tmp_path) -> None:
    model = store_tiny_model(FolderStore(tmp_path / "models"))
    with run_server(*model, tmp_path, "--drain-delay", "3600") as server:
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: server.get("/v2/health/ready").status == 503)
        assert server.get("/v1/models/cifar10").json["ready"] is False
        assert server.get("/v2/health/live").status == 200
        assert predict(server).status == 200
        server.process.send_signal(signal.SIGINT)  # the second drain: at once
        assert server.process.wait(300) == 0


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Iterator[ServerProcess]:
    """A server without time limits for its clients."""
    with holdable_server(tmp_path_factory.mktemp("quick"), "--max-connections", "64") as server:
        yield server
        assert "Traceback" not in server.log


@contextlib.contextmanager
def many_connections(server: ServerProcess, number: int, data: bytes) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(number):
            connections.append(stack.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=300)))
            with contextlib.suppress(ConnectionError):
                connections[-1].sendall(data)
        yield connections


def check_others_are_served(server: ServerProcess) -> None:
    """A client with a small picture and the kubelet get answers, while the other connections stay open."""
    for _ in range(5):
        assert predict(server).status == 200
        assert server.get("/v2/health/ready").status == 200


HEAD = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"GET / HTTP/1.1\r\nX-Slow: ", id="headers without end"),
        pytest.param(f"{HEAD}Content-Length: 16777216\r\n\r\n".encode(), id="a body only announced"),
        pytest.param(f"{HEAD}Content-Length: 16777216\r\n\r\n".encode() + bytes(1 << 20), id="the start of a body"),
        pytest.param(f"{HEAD}Transfer-Encoding: chunked\r\n\r\n5\r\n".encode(), id="the start of a chunk"),
        pytest.param(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 200, id="answers that nobody reads"),
    ],
)
def test_a_hundred_stalled_connections_do_not_block_others(quick, data) -> None:
    with many_connections(quick, 100, data):
        check_others_are_served(quick)


def test_memory_stays_bounded_with_endless_headers_and_bodies(quick) -> None:
    before = memory_of(quick)
    endless = b"GET / HTTP/1.1\r\nX-Endless: " + b"x" * (4 << 20)
    body = f"{HEAD}Content-Length: 16777216\r\n\r\n".encode() + bytes(8 << 20)
    for data in (endless, body):
        with many_connections(quick, 40, data):
            check_others_are_served(quick)
            assert memory_of(quick) - before < 100


def memory_of(server: ServerProcess) -> float:
    """Resident MiB."""
    return psutil.Process(server.process.pid).memory_info().rss / 2**20


def large_pictures(number: int, side: int) -> tuple[bytes, str]:
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG")
    return form(*[("image", buffer.getvalue())] * number)


def test_a_request_may_not_cost_more_than_one_large_picture(quick) -> None:
    with held(quick, "decoder"):  # it is refused before that
        answer = quick.post(PREDICT, *large_pictures(64, 2800))
    assert answer.status == 413
    assert "at most 16777216 pixels in all pictures of a request" in answer.json["error"]
    assert quick.post(PREDICT, *large_pictures(16, 1000)).status == 200


def test_small_pictures_do_not_wait_for_large_ones(quick) -> None:
    """There is room for only four large requests."""
    body = large_pictures(2, 2800)
    with ThreadPoolExecutor(16) as pool:
        with held(quick, "decoder"):
            futures = [pool.submit(quick.post, PREDICT, *body) for _ in range(16)]
            wait_for(lambda: num_done(futures) >= 12)
            check_others_are_served(quick)
        assert Counter(future.result().status for future in futures) == {200: 4, 429: 12}
    assert quick.post(PREDICT, *body).status == 200


def test_large_requests_take_at_most_half_of_the_slots(tmp_path) -> None:
    with holdable_server(tmp_path, "--max-pending-requests", "4") as server, ThreadPoolExecutor(24) as pool:
        with held(server, "decoder"):
            futures = [pool.submit(server.post, PREDICT, *large_pictures(2, 2800)) for _ in range(24)]
            wait_for(lambda: num_done(futures) >= 22)
            check_others_are_served(server)
        answers = [future.result() for future in futures]
        assert Counter(answer.status for answer in answers) == {200: 2, 429: 22}
        assert all("at most 2 large requests" in answer.json["error"] for answer in answers if answer.status == 429)


def test_a_killed_server_can_be_replaced_at_once(tmp_path) -> None:
    port = ("--port", str(free_port()))
    with holdable_server(tmp_path, *port) as server, ThreadPoolExecutor(1) as pool, held(server, "model"):
        future = pool.submit(predict, server)
        wait_for(lambda: metric(server, "cifar10_pending_requests") == 1)
        server.process.kill()
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            future.result()
    with holdable_server(tmp_path, *port) as again:
        assert predict(again).status == 200


def is_refused(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            return False
    except (ConnectionRefusedError, ConnectionResetError):  # the latter at the moment when the socket is closed
        return True
