"""The Unix socket through which the local deployment finds its server, with various peers."""

import asyncio
import contextlib
import json
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from cifar_assets.serving.http import HttpServer
from cifar_assets.serving.server import _Succession
from cifar_assets.serving.settings import ServingLimits
from resources.errors import DeployError
from resources.inference_service.local.resource import RunningServer, ServerInfo, _meet, find_server

INFO = ServerInfo("127.0.0.1", 8080, "u", "d", "1", {}, "server.log", os.getpid(), 1)
ANSWERS = st.one_of(
    st.binary(max_size=200),
    st.sampled_from([b"[" * 3000, b"null", b"{}", b'{"protocol": 1}', b'{"protocol": 1, "process_id": 1, "x": 2}']),
    st.just(json.dumps(asdict(INFO)).encode()),
)


@contextlib.contextmanager
def answering(folder: Path, answer: bytes, *, sends_descriptor: bool) -> Iterator[None]:
    """A peer that answers one connection to the folder's socket."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{folder}/serving.sock")
        listening.listen()

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                if sends_descriptor:
                    socket.send_fds(connection, [answer or b" "], [listening.fileno()])
                else:
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


@pytest.mark.fuzz
@given(answer=ANSWERS, sends_descriptor=st.booleans())
def test_any_answer_is_a_server_none_or_an_error_that_names_the_socket(answer, sends_descriptor) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        answering(Path(folder), answer, sends_descriptor=sends_descriptor),
    ):
        reason, found = "", None
        try:
            found = find_server(Path(folder))
        except DeployError as error:
            reason = str(error)
        assert not reason or "serving.sock" in reason
        assert found is None or found.info == INFO
        if found is not None:
            found.__exit__()


def test_a_server_of_another_version_is_reported_with_its_process() -> None:
    answer = b'{"process_id": 4711, "protocol": 1, "model_digest": "d"}'
    with (
        tempfile.TemporaryDirectory() as folder,
        answering(Path(folder), answer, sends_descriptor=True),
        pytest.raises(DeployError, match=r"this version of the project.*\"process_id\": 4711.*End that process"),
    ):
        find_server(Path(folder))


@pytest.mark.fuzz
@given(nonsense=st.binary(max_size=40))
def test_a_server_answers_until_it_drains_whatever_others_send(nonsense) -> None:
    async def run(folder: Path, listener: socket.socket) -> None:
        control = socket.socket(socket.AF_UNIX)
        control.bind(f"{folder}/starting.sock")
        control.listen()
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(f"{folder}/starting.sock")
        info = {name: value for name, value in asdict(INFO).items() if name not in ("process_id", "private_port")}
        left = asyncio.Event()
        succession = _Succession(control, listener, json.dumps(info), left.set)
        waiting = asyncio.create_task(succession.wait_for_turn(HttpServer(lambda request: None, ServingLimits())))
        starter = await asyncio.to_thread(_meet, connection, folder / "starting.sock", 60)
        assert starter is not None
        assert starter.info.private_port
        taking_over = asyncio.create_task(asyncio.to_thread(starter.take_over, folder, None))
        await waiting
        succession.begin()
        await taking_over
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(f"{folder}/serving.sock")
            connection.sendall(nonsense)
        found = await asyncio.to_thread(find_server, folder)
        assert isinstance(found, RunningServer)
        assert found.info == starter.info
        assert found.info.process_id == os.getpid()
        assert found.listener.getsockname() == listener.getsockname()
        found.leave()
        await left.wait()
        succession.end()
        assert await asyncio.to_thread(found.connection.recv, 1)
        assert find_server(folder) is None
        for server in (starter, found):
            server.__exit__()

    with tempfile.TemporaryDirectory() as name, socket.create_server(("127.0.0.1", 0)) as listener:
        uvloop.run(asyncio.wait_for(run(Path(name), listener), 300))


def test_a_folder_whose_path_is_longer_than_an_address_works(tmp_path, monkeypatch) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    assert find_server(folder) is None
    monkeypatch.chdir(folder)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("serving.sock")
        listening.listen()
        monkeypatch.undo()
        threading.Thread(target=lambda: listening.accept()[0].close()).start()
        assert find_server(folder) is None
    assert find_server(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8080"),
        ("0.0.0.0", "http://127.0.0.1:8080"),
        ("::", "http://localhost:8080"),
        ("::1", "http://[::1]:8080"),
    ],
)
def test_the_url_is_one_that_this_machine_can_ask(host, url) -> None:
    assert ServerInfo(**{**asdict(INFO), "host": host}).url == url
