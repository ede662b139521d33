"""A real server process for tests, and plain HTTP to ask it."""

import contextlib
import http.client
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENT = ("--header-timeout", "3600", "--body-timeout", "3600", "--stall-timeout", "3600", "--idle-timeout", "3600")
"""Options of a server that does not take the clients of a busy machine for slow ones."""


@dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class ServerProcess:
    process: "subprocess.Popen[bytes]"
    port: int
    log_file: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def connect(self, timeout: float = 300) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def get(self, path: str) -> Answer:
        return ask(self.port, "GET", path)

    def post(
        self, path: str, body: bytes | Any, content_type: str | None = "application/json", **headers: str
    ) -> Answer:
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if content_type is not None:
            named["Content-Type"] = content_type
        return ask(self.port, "POST", path, body, named)


def ask(
    port: int, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    with contextlib.closing(connection):
        return ask_on(connection, method, path, body, headers)


def ask_on(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    connection.request(method, path, body, dict(headers or {}))
    response = connection.getresponse()
    return Answer(response.status, response.headers, response.read())


@contextlib.contextmanager
def run_server(
    model_uri: str, digest: str, folder: Path, *options: str, program: Sequence[str] = ("-m", "cifar_assets.serving")
) -> Iterator[ServerProcess]:
    """A server on a free port, ready when the block begins and gone when it ends. `program` is what Python runs."""
    log_file = folder / "server.log"
    command = [sys.executable, *program, "--model-uri", model_uri, "--model-digest", digest]
    command += ["--port", "0", "--threads", "1", "--linger", "0.2", *options]
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        while not (found := re.search(r"Serving model \w+ on http://.*:(\d+)\n", log_file.read_text())):
            assert process.poll() is None, log_file.read_text()
            time.sleep(0.02)
        yield ServerProcess(process, int(found[1]), log_file)
    finally:
        process.terminate()
        try:
            process.wait(300)
        finally:
            process.kill()
            process.wait()


def form(*parts: tuple[str, bytes], content_type: str = "image/png") -> tuple[bytes, str]:
    """A multipart body of files by part name, and its content type."""
    boundary = "a-boundary"
    pieces = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="a.png"\r\n'
        f"Content-Type: {content_type}\r\n\r\n".encode()
        + data
        + b"\r\n"
        for name, data in parts
    ]
    return b"".join([*pieces, f"--{boundary}--\r\n".encode()]), f"multipart/form-data; boundary={boundary}"
