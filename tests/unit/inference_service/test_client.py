"""The client with a server of another kind, and with truncated responses."""

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from resources.inference_service.client import InferenceClient, ServerError

IMAGE = np.zeros((1, 3, 32, 32), np.uint8)
Answering = Callable[[bytes], int]


@pytest.fixture
def answering() -> Iterator[Answering]:
    """Yields the port of a server that answers every request with these bytes."""
    listeners: list[socket.socket] = []

    def start(answer: bytes) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        return listener.getsockname()[1]

    yield start
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def http(body: bytes, status: str = "200 OK", length: int | None = None) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"SSH-2.0-OpenSSH\r\n", id="no HTTP"),
        pytest.param(http(b"{}", length=9), id="a body that is cut off"),
        pytest.param(http(b"{}", "503 Busy", length=9), id="an error that is cut off"),
        pytest.param(http(b"hello"), id="no JSON"),
        pytest.param(http(b"[]"), id="a list"),
        pytest.param(http(b'{"ready": true}'), id="no digest"),
        pytest.param(http(b'{"predictions": [1], "outputs": 1}'), id="other types"),
    ],
)
def test_an_answer_of_another_server_is_a_server_error(answering: Answering, tmp_path: Path, answer: bytes) -> None:
    client = InferenceClient(f"http://127.0.0.1:{answering(answer)}", timeout=60)
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"x")
    for ask in (client.served_model, lambda: client.predict_arrays(IMAGE), lambda: client.predict_files([picture])):
        with pytest.raises(ServerError, match=client.base_url):
            ask()
