"""The page on which one person labels a batch. It listens on loopback only, and answers only its own page."""

import json
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from cifar_assets.labelling.batches import Desk
from cifar_assets.serving.answers import Response
from cifar_assets.serving.page import document
from resources.errors import DataError, ExplainedError

_MAX_BODY_BYTES = 10_000


class _Given(BaseModel):
    file: str
    label: str | None


class LabellingServer(ThreadingHTTPServer):
    """Serves the page on 127.0.0.1; on a free port if that is 0."""

    daemon_threads = True

    def __init__(self, desk: Desk, port: int):
        super().__init__(("127.0.0.1", port), _Handler)
        self.desk = desk
        self.host = f"127.0.0.1:{self.server_port}"
        self.page = document(Path(__file__).with_name("page.html"), {"name": desk.name})


class _Handler(BaseHTTPRequestHandler):
    server: LabellingServer  # pyright: ignore[reportIncompatibleVariableOverride]  (no other one creates it)

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        try:
            response = self._response() if self._is_from_the_page() else _json({"error": "Open the page itself."}, 403)
        except ExplainedError as error:
            response = _json({"error": str(error)}, 400)
        self.send_response(response.status, HTTPStatus(response.status).phrase)
        for name, value in (("Content-Type", response.content_type), ("Cache-Control", "no-store"), *response.headers):
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        self.wfile.write(response.body)

    def _is_from_the_page(self) -> bool:
        """Other sites' pages cannot send this origin, nor, with a name of theirs for 127.0.0.1, this host."""
        host = self.headers["Host"]
        is_own = host in (self.server.host, f"localhost:{self.server.server_port}")
        return is_own and (self.command == "GET" or self.headers["Origin"] == f"http://{host}")

    def _response(self) -> Response:
        desk = self.server.desk
        body = self.rfile.read(min(int(self.headers["Content-Length"] or 0), _MAX_BODY_BYTES))
        match self.command, self.path:
            case "GET", "/":
                return self.server.page
            case "GET", "/batch":
                return _json(desk.state())
            case "POST", "/label":
                given = _parse(body)
                return _json(desk.label(given.file, given.label))
            case "POST", "/save":
                return _json(desk.save())
        return _json({"error": "Not Found. The page is at /."}, 404)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


def _parse(body: bytes) -> _Given:
    try:
        return _Given.model_validate_json(body)
    except ValidationError as error:
        raise DataError(f"The request is not valid ({error}): reload the page.") from error


def _json(value: Any, status: int = 200) -> Response:
    return Response(status, json.dumps(value).encode())
