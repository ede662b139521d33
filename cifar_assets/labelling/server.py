"""The page on which one person labels a batch. It listens on loopback only, and answers only its own page."""

import json
import logging
import threading
from datetime import UTC, datetime
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cifar_assets.labelling import batches
from cifar_assets.labelling.batches import Label
from cifar_assets.serving.answers import Response
from cifar_assets.serving.page import document
from resources.errors import DataError, ExplainedError
from resources.object_store import ObjectStore

_log = logging.getLogger(__name__)
_HTML = Path(__file__).with_name("page.html")
_MAX_BODY_BYTES = 10_000


class Desk:
    """A batch and its labels. Each label is stored at once; `save` lands them."""

    def __init__(self, raw: ObjectStore, name: str | None, by: str):
        self.name = name or batches.newest_batch(raw)
        self._raw = raw
        self._by = by
        self._batch = batches.read_batch(raw, self.name)
        self._files = {picture.file for picture in self._batch.pictures}
        self._labels = batches.read_labels(raw, self.name)
        self._lock = threading.Lock()

    def state(self) -> dict[str, Any]:
        """The batch, and its labels in the order in which they were given."""
        labels = sorted(self._labels.items(), key=lambda item: item[1].time)
        return {
            "name": self.name,
            **self._batch.model_dump(mode="json", include={"classes", "pictures"}),
            "labels": {file: label.label for file, label in labels},
        }

    def picture(self, file: str) -> bytes:
        """The PNG file of a picture. DataError if the batch does not have it."""
        if file not in self._files:
            raise DataError(f"Batch {self.name} has no picture {file!r}: reload the page.")
        return batches.read_picture(self._raw, self.name, file)

    def label(self, file: str, label: str | None) -> None:
        """Label a picture, or with None remove its label. DataError for an unknown picture or class."""
        if file not in self._files or label not in (None, *self._batch.classes):
            raise DataError(f"Batch {self.name} has no picture {file!r} or no class {label!r}: reload the page.")
        with self._lock:
            labels = {name: given for name, given in self._labels.items() if name != file}
            if label is not None:
                labels[file] = Label(label=label, by=self._by, time=datetime.now(UTC))
            batches.write_labels(self._raw, self.name, labels)
            self._labels = labels

    def save(self) -> dict[str, Any]:
        """Land all labels, in place of those that this batch landed before. DataError if there are none."""
        with self._lock:
            if not self._labels:
                raise DataError(f"Batch {self.name} has no labels: give some first.")
            pictures = [picture for picture in self._batch.pictures if picture.file in self._labels]
            rows = ((self.picture(each.file), each.request_id, self._labels[each.file]) for each in pictures)
            key = batches.land_labels(self._raw, f"labeled/{self.name}", self._batch.classes, rows)
        return {"saved": len(pictures), "key": key}


class LabellingServer(ThreadingHTTPServer):
    """Serves the page on 127.0.0.1; on a free port if that is 0."""

    daemon_threads = True

    def __init__(self, desk: Desk, port: int):
        super().__init__(("127.0.0.1", port), _Handler)
        self.desk = desk
        self.host = f"127.0.0.1:{self.server_port}"
        self.page = document(_HTML, {"name": desk.name}, images="'self' data:")


class _Handler(BaseHTTPRequestHandler):
    server: LabellingServer  # pyright: ignore[reportIncompatibleVariableOverride]  (no other one creates it)

    def do_GET(self) -> None:
        desk, path = self.server.desk, self.path
        if path == "/":
            self._answer(lambda: self.server.page)
        elif path == "/batch":
            self._answer(lambda: _json(desk.state()))
        else:
            self._answer(lambda: Response(200, desk.picture(path.removeprefix("/pictures/")), "image/png"))

    def do_POST(self) -> None:
        self._answer(self._change)

    def _change(self) -> Response:
        desk = self.server.desk
        try:
            asked = json.loads(self.rfile.read(min(int(self.headers["Content-Length"]), _MAX_BODY_BYTES)))
            if self.path == "/save":
                return _json(desk.save())
            desk.label(asked["file"], asked["label"])
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"The request is not valid ({error!r}): reload the page.") from error
        return _json({})

    def _answer(self, handle: Any) -> None:
        try:
            response = handle() if self._is_from_the_page() else _json({"error": "Open the page itself."}, 403)
        except ExplainedError as error:
            response = _json({"error": str(error)}, 400)
        self.send_response(response.status, HTTPStatus(response.status).phrase)
        for name, value in (("Content-Type", response.content_type), ("Cache-Control", "no-store"), *response.headers):
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        self.wfile.write(response.body)

    def _is_from_the_page(self) -> bool:
        """Other sites' pages cannot send this type or origin; with a name of theirs for 127.0.0.1, not this host."""
        host = self.headers["Host"]
        return host in (self.server.host, f"localhost:{self.server.server_port}") and (
            self.command == "GET"
            or (self.headers["Content-Type"] == "application/json" and self.headers["Origin"] == f"http://{host}")
        )

    def log_message(self, format: str, *args: object) -> None:
        _log.debug(format, *args)


def _json(value: Any, status: int = 200) -> Response:
    return Response(status, json.dumps(value).encode())
