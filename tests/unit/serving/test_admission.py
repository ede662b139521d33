"""The door: what is let in, what is counted, and what is answered before a body is kept."""

import asyncio
import json
from typing import Any

import pytest

from cifar_assets.serving.admission import Admission, Message
from cifar_assets.serving.limits import ServingLimits


class Door:
    """An Admission in front of an application that answers with the number of bytes it got, once it is let."""

    def __init__(self, *, is_open: bool = True, **limits: Any):
        self.may_answer = asyncio.Event()
        if is_open:
            self.may_answer.set()
        self.entered = 0
        self.admission = Admission(self._app, ServingLimits(**limits), retry_after=lambda: 7)

    async def _app(self, scope, receive, send) -> None:
        self.entered += 1
        num_bytes = len((await receive())["body"]) if scope["method"] == "POST" else 0
        await self.may_answer.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": json.dumps({"bytes": num_bytes}).encode()})

    async def ask(
        self,
        chunks: list[bytes],
        *,
        method: str = "POST",
        headers: dict[str, str] | None = None,
        vanish: bool = False,
        stall: bool = False,
    ) -> tuple[int, dict[str, str], dict[str, Any]]:
        incoming = [
            {"type": "http.request", "body": chunk, "more_body": index + 1 < len(chunks) or vanish or stall}
            for index, chunk in enumerate(chunks)
        ]
        sent: list[Message] = []

        async def receive() -> Message:
            if incoming:
                return incoming.pop(0)
            if stall:
                await asyncio.sleep(3600)
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)

        raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        await self.admission({"type": "http", "method": method, "headers": raw}, receive, send)
        if not sent:
            return 0, {}, {}
        answer_headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        return sent[0]["status"], answer_headers, json.loads(sent[1]["body"])


def test_a_body_within_the_limits_arrives_whole():
    async def story():
        door = Door(max_body_bytes=10)
        assert await door.ask([b"abc", b"defg", b""]) == (200, {}, {"bytes": 7})
        assert await door.ask([b"x" * 10], headers={"content-length": "10"}) == (200, {}, {"bytes": 10})

    asyncio.run(story())


@pytest.mark.parametrize(
    ("chunks", "headers"),
    [
        ([b"x" * 11], {"content-length": "11"}),
        ([b"x" * 6, b"x" * 5], {}),
        ([b"x"], {"content-length": "99999999999999999999999999"}),
        ([b"x" * 11], {"content-length": "1"}),
        ([b""], {"content-length": "11", "expect": "100-continue"}),
    ],
)
def test_a_body_over_the_limit_is_refused_and_forgotten(chunks, headers):
    async def story():
        door = Door(max_body_bytes=10)
        status, answer_headers, body = await door.ask(chunks, headers=headers)
        assert status == 413
        assert answer_headers["connection"] == "close"
        assert body["field"] == "body"
        assert body["expected"] == "at most 10 bytes"
        assert door.entered == 0
        assert await door.ask([b"x" * 10]) == (200, {}, {"bytes": 10})

    asyncio.run(story())


def test_requests_over_the_number_are_told_to_come_again_while_health_passes():
    async def story():
        door = Door(is_open=False, max_pending_requests=2)
        inside = [asyncio.create_task(door.ask([b"x"])) for _ in range(2)]
        await asyncio.sleep(0)
        status, headers, body = await door.ask([b"x"])
        assert status == 429
        assert headers["retry-after"] == "7"
        assert "at most 2 requests" in body["error"]
        health = asyncio.create_task(door.ask([], method="GET"))
        await asyncio.sleep(0)
        assert door.entered == 3
        door.may_answer.set()
        assert [(await task)[0] for task in [*inside, health]] == [200] * 3
        assert (await door.ask([b"x"]))[0] == 200

    asyncio.run(story())


def test_bodies_over_the_sum_are_told_to_come_again():
    async def story():
        door = Door(is_open=False, max_pending_bytes=10)
        inside = asyncio.create_task(door.ask([b"x" * 6], headers={"content-length": "6"}))
        await asyncio.sleep(0)
        for headers in ({"content-length": "5"}, {}):
            status, answer_headers, body = await door.ask([b"x" * 5], headers=headers)
            assert status == 429
            assert answer_headers["retry-after"] == "7"
            assert "at most 10 bytes of requests" in body["error"]
        door.may_answer.set()
        assert (await inside)[0] == 200
        assert (await door.ask([b"x" * 10]))[0] == 200

    asyncio.run(story())


def test_a_client_that_goes_away_or_dawdles_frees_its_place():
    async def story():
        door = Door(max_pending_requests=1, body_timeout=0.01)
        assert await door.ask([b"x"], vanish=True) == (0, {}, {})
        status, _, body = await door.ask([b"xyz"], stall=True)
        assert status == 408
        assert body["received"] == "3 bytes"
        assert (await door.ask([b"x"]))[0] == 200

    asyncio.run(story())


def test_a_fault_of_the_application_frees_the_place():
    async def story():
        async def failing(scope, receive, send):
            raise RuntimeError

        door = Door(max_pending_requests=1)
        door.admission._app = failing
        for _ in range(3):
            with pytest.raises(RuntimeError):
                await door.ask([b"x"])

    asyncio.run(story())


def test_a_client_that_goes_away_before_its_refusal_frees_its_place():
    async def story():
        async def gone(message: Message) -> None:
            raise ConnectionResetError

        async def receive() -> Message:
            return {"type": "http.request", "body": b"xx", "more_body": False}

        door = Door(max_pending_requests=1, max_body_bytes=1)
        with pytest.raises(ConnectionResetError):
            await door.admission({"type": "http", "method": "POST", "headers": []}, receive, gone)
        assert (await door.ask([b"x"]))[0] == 200

    asyncio.run(story())


def test_compressed_bodies_are_refused():
    async def story():
        status, _, body = await Door().ask([b"x"], headers={"content-encoding": "gzip"})
        assert status == 415
        assert body["field"] == "Content-Encoding"

    asyncio.run(story())


def test_on_leaving_every_answer_closes_its_connection():
    async def story():
        door = Door(max_body_bytes=1)
        door.admission.leaving = True
        for chunks, method in (([b"x"], "POST"), ([b"xx"], "POST"), ([], "GET")):
            assert (await door.ask(chunks, method=method))[1]["connection"] == "close"

    asyncio.run(story())
