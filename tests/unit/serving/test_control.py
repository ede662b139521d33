"""The control socket of the local deployment, whatever is at its other end."""

import json
import os
import socket
import tempfile
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifar_assets.serving.control import PROTOCOL, ControlSocket, RunningServer, ServerInfo, find_server
from resources.errors import DeployError

INFO = ServerInfo(pid=os.getpid(), host="127.0.0.1", port=8080, model_uri="u", model_digest="d", model_version="1")
ANSWERS = st.one_of(
    st.binary(max_size=200),
    st.sampled_from([b"[" * 3000, b"null", b"{}", b'{"protocol": 1}', b'{"protocol": 1, "pid": 1, "x": 2}']),
    st.fixed_dictionaries({"protocol": st.integers(0, 3), "pid": st.integers() | st.text()}).map(
        lambda value: json.dumps(value).encode()
    ),
)


@pytest.mark.fuzz
@given(answer=ANSWERS, sends_descriptor=st.booleans())
def test_any_answer_is_a_server_none_or_an_error_that_names_the_socket(answer, sends_descriptor):
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listening:
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
        reason = ""
        try:
            found = find_server(Path(folder))
        except DeployError as error:
            found, reason = None, str(error)
        thread.join()
        assert not reason or "serving.sock" in reason or "another version" in reason
        assert found is None or found.info.protocol == PROTOCOL


@pytest.mark.fuzz
@given(command=st.binary(max_size=40).filter(lambda data: data[:16] != b"leave\n"))
def test_any_command_but_leave_changes_nothing(command):
    left: list[None] = []
    with tempfile.TemporaryDirectory() as name, socket.create_server(("127.0.0.1", 0)) as listener:
        folder = Path(name)
        control = ControlSocket(folder)
        control.serve(INFO, listener, lambda: left.append(None))
        control.take_over()
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(f"{name}/serving.sock")
            connection.sendall(command)
        found = find_server(folder)
        assert isinstance(found, RunningServer)
        assert found.info == INFO
        assert found.listener.getsockname() == listener.getsockname()
        assert not left
        found.leave()
        assert left
        found.close()
        control.close()
        assert find_server(folder) is None


def test_a_folder_whose_path_is_longer_than_an_address_works(tmp_path):
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        control = ControlSocket(folder)
        control.serve(INFO, listener, lambda: None)
        assert find_server(folder) is None
        control.take_over()
        found = find_server(folder)
        assert found is not None
        found.close()
        control.close()
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
def test_the_url_is_one_that_this_machine_can_ask(host, url):
    assert ServerInfo(**{**INFO.__dict__, "host": host}).url == url
