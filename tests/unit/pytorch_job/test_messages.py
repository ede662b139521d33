"""Pipes messages through the store: none lost, none recorded twice, whatever happens on either side."""

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import dagster as dg
import pytest
from dagster_pipes import (
    PipesContext,
    PipesDefaultMessageWriter,
    PipesMappingParamsLoader,
    encode_param,
    open_dagster_pipes,
)
from hypothesis import given
from hypothesis import strategies as st

from resources.errors import StoreError
from resources.object_store import FolderStore
from resources.object_store.folder import write_atomically
from resources.pipes_reader import MessagesLostError, PipesStoreMessageReader
from resources.pipes_store import PipesStoreMessageWriter, _StoreChannel
from tests.unit.pytorch_job.fake_cluster import FakeClock

CONTEXT = {
    "asset_keys": None,
    "code_version_by_asset_key": None,
    "provenance_by_asset_key": None,
    "partition_key": None,
    "partition_key_range": None,
    "partition_time_window": None,
    "run_id": "run",
    "job_name": "job",
    "retry_number": 0,
    "extras": {},
}


class Handler(dg.PipesMessageHandler):
    """Keeps what Dagster's handler would be given."""

    def __init__(self) -> None:
        self.messages: list[Any] = []

    def handle_message(self, message: Any) -> None:
        self.messages.append(message)

    def methods(self) -> list[str]:
        return [message["method"] for message in self.messages]

    def texts(self) -> list[str]:
        return [message["params"]["message"] for message in self.messages if message["method"] == "log"]

    def payloads(self) -> list[Any]:
        return [m["params"]["payload"] for m in self.messages if m["method"] == "report_custom_message"]


class FlakyStore(FolderStore):
    """A folder that does not answer while `away` is set."""

    away = False

    def write(self, key: str, data: bytes) -> None:
        self._check_away()
        super().write(key, data)

    def list(self, prefix: str = ""):
        self._check_away()
        return super().list(prefix)

    def at(self, prefix: str) -> "FlakyStore":
        store = FlakyStore(super().at(prefix).root)
        store.away = self.away
        return store

    def _check_away(self) -> None:
        if self.away:
            raise StoreError("the store is away", transient=True)


@pytest.fixture
def store(tmp_path: Path) -> FlakyStore:
    return FlakyStore(tmp_path)


def reader_of(store: FolderStore, run_id: str = "run", **kwargs: Any) -> PipesStoreMessageReader:
    return PipesStoreMessageReader(store, launch_id="launch", run_id=run_id, logger=logging.getLogger("t"), **kwargs)


@contextmanager
def process(params: Any, writer: PipesDefaultMessageWriter | None = None) -> Iterator[Any]:
    """What runs in the pod."""
    loader = PipesMappingParamsLoader(
        {"DAGSTER_PIPES_CONTEXT": encode_param({"data": CONTEXT}), "DAGSTER_PIPES_MESSAGES": encode_param(params)}
    )
    writer = writer or PipesStoreMessageWriter(interval_seconds=0.01)
    PipesContext._instance = None  # one process has one context; here several stand for several processes
    with open_dagster_pipes(params_loader=loader, message_writer=writer) as pipes:
        yield pipes


def speak(params: Any, *epochs: int, text: str = "hello") -> None:
    with process(params) as pipes:
        pipes.log.info(text)
        for epoch in epochs:
            pipes.report_custom_message({"epoch": epoch})


def test_messages_arrive_in_order(store: FlakyStore) -> None:
    handler, reader = Handler(), reader_of(store)
    with reader.read_messages(handler) as params:
        speak(params, 1, 2, 3)
        reader.poll()
        assert handler.payloads() == [{"epoch": 1}, {"epoch": 2}, {"epoch": 3}]
    assert handler.methods()[0] == "opened"
    assert handler.methods()[-1] == "closed"
    assert handler.texts() == ["hello"]


def test_arrives_while_the_process_still_runs(store: FlakyStore) -> None:
    handler, reader = Handler(), reader_of(store)
    with reader.read_messages(handler) as params, process(params) as pipes:
        pipes.report_custom_message({"epoch": 1})
        while not handler.payloads():
            reader.poll()
        assert handler.payloads() == [{"epoch": 1}]


def test_poll_gives_nothing_twice(store: FlakyStore) -> None:
    handler, reader = Handler(), reader_of(store)
    with reader.read_messages(handler) as params:
        speak(params, 1)
        reader.poll()
        reader.poll()
        assert handler.payloads() == [{"epoch": 1}]


def test_restarted_process_adds_messages_and_closes_once(store: FlakyStore) -> None:
    handler, reader = Handler(), reader_of(store)
    with reader.read_messages(handler) as params:
        speak(params, 1)
        reader.poll()
        speak(params, 2)
        reader.poll()
    assert handler.payloads() == [{"epoch": 1}, {"epoch": 2}]
    assert handler.methods().count("opened") == handler.methods().count("closed") == 1
    assert handler.methods()[-1] == "closed"


def test_process_that_was_killed_and_started_again_counts_as_not_closed_until_it_ends(store: FlakyStore) -> None:
    handler, reader = Handler(), reader_of(store)
    with reader.read_messages(handler) as params:
        speak(params, 1)
        store.write(
            "messages/launch/99999999999999999999-killed/00000000.jsonl", b'{"method": "opened", "params": {}}\n'
        )
        reader.poll()
    assert "closed" not in handler.methods()


def test_reattached_run_gets_results_again_but_logs_only_once(store: FlakyStore) -> None:
    seen: list[tuple[Any, bool]] = []
    first = Handler()
    reader = reader_of(store, on_message=lambda payload, replayed: seen.append((payload["epoch"], replayed)))
    with reader.read_messages(first) as params:
        speak(params, 1, text="from the first attempt")
        reader.poll()
        speak(params, 2, text="while nobody watched")
    second = Handler()
    again = reader_of(store, on_message=lambda payload, replayed: seen.append((payload["epoch"], replayed)))
    with again.read_messages(second):
        again.poll()
    assert second.payloads() == [{"epoch": 1}, {"epoch": 2}]
    assert second.texts() == ["while nobody watched"]
    assert seen == [(1, False), (1, True), (2, False)]


def test_another_run_that_adopts_the_job_records_everything_itself(store: FlakyStore) -> None:
    reader = reader_of(store)
    with reader.read_messages(Handler()) as params:
        speak(params, 1)
        reader.poll()
    handler, other = Handler(), reader_of(store, run_id="retry")
    with other.read_messages(handler):
        other.poll()
    assert handler.texts() == ["hello"]


def test_reader_attaches_to_the_job_it_adopts(store: FlakyStore) -> None:
    with reader_of(store).read_messages(Handler()) as params:
        speak(params, 1)
    handler = Handler()
    adopting = PipesStoreMessageReader(store, launch_id="unused", run_id="run", logger=logging.getLogger("t"))
    with adopting.read_messages(handler):
        adopting.attach("launch")
        adopting.poll()
    assert handler.payloads() == [{"epoch": 1}]


def test_store_that_is_away_for_a_while_loses_nothing(store: FlakyStore) -> None:
    handler, reader = Handler(), reader_of(store)
    opened: list[FlakyStore] = []

    def open_flaky(uri: str) -> FlakyStore:
        opened.append(FlakyStore(store.at("messages/launch").root))
        return opened[0]

    with reader.read_messages(handler) as params:
        writer = PipesStoreMessageWriter(open_store=open_flaky, interval_seconds=0.01)
        with process(params, writer) as pipes:
            opened[0].away = store.away = True
            for epoch in range(50):
                pipes.report_custom_message({"epoch": epoch})
            reader.poll()
            opened[0].away = store.away = False
        reader.poll()
    assert handler.payloads() == [{"epoch": epoch} for epoch in range(50)]


def test_writer_that_cannot_deliver_does_not_end_as_a_success(store: FlakyStore) -> None:
    gone = FlakyStore(store.root)
    gone.away = True
    writer = PipesStoreMessageWriter(open_store=lambda uri: gone, interval_seconds=0.01, close_timeout_seconds=0.05)
    with (
        reader_of(store).read_messages(Handler()) as params,
        pytest.raises(StoreError, match="Pipes messages could not be written") as caught,
        process(params, writer) as pipes,
    ):
        pipes.log.info("never heard")
    assert caught.value.transient


def test_chunk_that_was_given_up_is_an_error_though_the_store_takes_the_next(tmp_path: Path) -> None:
    class FailsOnce(FolderStore):
        failures = 0

        def write(self, key: str, data: bytes) -> None:
            self.failures += 1
            if self.failures > 1:
                return super().write(key, data)
            channel.write_message(message)
            raise StoreError("away")

    message: Any = {"method": "log"}
    channel = _StoreChannel(FailsOnce(tmp_path), interval_seconds=60)
    channel.write_message(message)
    with pytest.raises(StoreError, match=r"could not be written.*away"):
        channel.close(timeout_seconds=-1)
    assert list(tmp_path.iterdir()) == []


def test_invalid_json_message_is_rejected(store: FlakyStore) -> None:
    handler, reader = Handler(), reader_of(store)
    with reader.read_messages(handler) as params:
        with process(params) as pipes:
            with pytest.raises(TypeError, match="not JSON serializable"):
                pipes.report_custom_message({"loss": object()})
            pipes.report_custom_message({"epoch": 1})
        reader.poll()
    assert handler.payloads() == [{"epoch": 1}]


def test_store_that_fails_in_an_unforeseen_way_is_tried_again(
    store: FlakyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = [OSError("odd"), KeyError("odder")]

    class Odd(FlakyStore):
        def write(self, key: str, data: bytes) -> None:
            if failures:
                raise failures.pop()
            super().write(key, data)

    handler, reader = Handler(), reader_of(store)
    with reader.read_messages(handler) as params:
        odd = Odd(store.at("messages/launch").root)
        with process(params, PipesStoreMessageWriter(open_store=lambda uri: odd, interval_seconds=0.01)) as pipes:
            pipes.report_custom_message({"epoch": 1})
        reader.poll()
    assert handler.payloads() == [{"epoch": 1}]


def test_lost_messages_are_an_error_after_the_timeout(store: FlakyStore) -> None:
    clock = FakeClock()
    reader = reader_of(store)
    with reader.read_messages(Handler()):
        store.away = True
        reader.poll()
        with pytest.raises(MessagesLostError, match="could not be read for 60 s"):
            reader.drain(timeout_seconds=60, clock=clock, sleeper=clock.sleep)
        clock.after(30, lambda: setattr(store, "away", False))
        store.away = True
        reader.drain(timeout_seconds=60, clock=clock, sleeper=clock.sleep)


def test_mark_is_written_again_when_the_store_refused_it(store: FlakyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    handler, reader = Handler(), reader_of(store)
    with reader.read_messages(handler) as params:
        speak(params, 1)
        with monkeypatch.context() as patch:
            patch.setattr(
                store, "write", lambda key, data: store._check_away() or (_ for _ in ()).throw(StoreError("no"))
            )
            reader.poll()
        reader.poll()
    mark = json.loads(store.read("read/launch/run.json"))
    assert len(mark) == 1
    assert handler.payloads() == [{"epoch": 1}]


def test_writer_falls_back_to_the_default_of_dagster_pipes(tmp_path: Path) -> None:
    path = tmp_path / "messages"
    with process({"path": str(path)}) as pipes:
        pipes.report_custom_message({"epoch": 1})
    assert [json.loads(line)["method"] for line in path.read_text().splitlines()] == [
        "opened",
        "report_custom_message",
        "closed",
    ]


def test_chunk_that_is_still_being_written_is_read_when_it_is_whole(tmp_path: Path) -> None:
    store, handler = FolderStore(tmp_path), Handler()
    reader = reader_of(store)
    line = json.dumps({"method": "report_custom_message", "params": {"payload": {"epoch": 1}}}).encode()

    def write_in_two_parts(file: BinaryIO) -> None:
        file.write(line[:20])
        file.flush()
        reader.poll()
        assert handler.messages == []
        file.write(line[20:])

    with reader.read_messages(handler):
        write_atomically(tmp_path / "messages/launch/writer/0001.jsonl", write_in_two_parts)
        reader.poll()
    assert handler.payloads() == [{"epoch": 1}]


LINES = st.one_of(
    st.binary(max_size=60).map(lambda data: data.replace(b"\n", b"")),
    st.sampled_from([b"null", b"[]", b'"a"', b"{}", b"[" * 3000, b'{"method": "log"}', b"\xff", b"9" * 5000]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=6,
    ).map(lambda value: json.dumps(value).encode()),
)


@pytest.mark.fuzz
@given(before=st.lists(LINES, max_size=4), after=st.lists(LINES, max_size=4), mark=LINES)
def test_lines_that_are_not_messages_are_named_and_ignored(before, after, mark) -> None:
    message = {"__dagster_pipes_version": "0.1", "method": "report_custom_message", "params": {"payload": {"epoch": 1}}}
    data = b"\n".join([*before, json.dumps(message).encode(), *after])
    with tempfile.TemporaryDirectory() as folder:
        store = FolderStore(Path(folder))
        store.write("messages/launch/writer/0001.jsonl", data)
        store.write("read/launch/run.json", mark)
        handler, reader = Handler(), reader_of(store)
        with reader.read_messages(handler):
            reader.poll()
            reader.poll()
    assert handler.payloads() == [{"epoch": 1}]
