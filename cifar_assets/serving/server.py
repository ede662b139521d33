"""One server process: load, verify, warm up, then listen; leave without losing a request."""

import asyncio
import contextlib
import json
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time

import numpy as np
import uvloop

from cifar_assets.contracts import IMAGE_SHAPE
from cifar_assets.serving.app import App
from cifar_assets.serving.classifier import Classifier, load_classifier
from cifar_assets.serving.control import ControlSocket, ServerInfo
from cifar_assets.serving.http import HttpServer
from cifar_assets.serving.ports import bind_address, http_url
from cifar_assets.serving.settings import ServerSettings
from resources.errors import ConfigError, DataError, ExplainedError

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.02
_OTHER_FILES = 128


def run_server(settings: ServerSettings) -> None:
    """Serve until SIGTERM or SIGINT. Returns after a complete drain.

    Raises ConfigError when the address cannot be had, and what `load_classifier` raises; then nothing ever listened.
    """
    try:
        listener = _listener(settings)
        classifier = load_classifier(
            settings.model_uri,
            settings.model_digest,
            num_threads=settings.threads,
            batch_images=settings.limits.batch_images,
        )
        control = ControlSocket(settings.control_dir) if settings.control_dir else None
    except Exception as error:
        is_own = isinstance(error, ExplainedError)
        _report(settings, state="failed", reason=str(error) if is_own else f"{type(error).__name__}: {error}")
        raise
    if control is not None:
        _report(settings, state="loaded")
        if not sys.stdin.readline():
            raise ConfigError("Whoever asked for this server has gone.")
    _allow_open_files(settings.limits.max_connections + _OTHER_FILES)
    uvloop.run(_Server(settings, listener, control).serve(classifier))


class _Server:
    """The way of a server from its first connection to its last."""

    def __init__(self, settings: ServerSettings, listener: socket.socket, control: ControlSocket | None):
        self._settings = settings
        self._listener = listener
        self._control = control
        self._is_ready = True
        self._told_to_leave = asyncio.Event()
        self._told_to_end = asyncio.Event()
        self._accepts_nothing = threading.Event()

    async def serve(self, classifier: Classifier) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        app = App(self._settings.identity, classifier.run, self._settings.limits, lambda: self._is_ready)
        http = HttpServer(app, self._settings.limits)
        http.sweep()
        if self._control is not None:
            await self._check_itself(http)
        server = await loop.create_server(http.connect, sock=self._listener, backlog=2048)
        host, port = self._listener.getsockname()[:2]
        if self._control is not None:
            self._control.serve(self._info(port), self._listener, self._leave_from_thread(loop))
            await asyncio.to_thread(self._control.take_over)
        _log.info("Serving model %s on %s", self._settings.model_digest, http_url(host, port))
        _report(self._settings, state="ready", host=host, port=port, pid=os.getpid())
        await self._told_to_leave.wait()
        leaving = loop.create_task(self._leave(http, server))
        await asyncio.wait([leaving, loop.create_task(self._told_to_end.wait())], return_when=asyncio.FIRST_COMPLETED)
        http.abort()
        app.close()

    async def _check_itself(self, http: HttpServer) -> None:
        """Ask this server over HTTP, where nobody else can, before it takes the place of another."""
        from resources.inference_service.client import InferenceClient

        private = await asyncio.get_running_loop().create_server(http.connect, "127.0.0.1", 0)
        client = InferenceClient(f"http://127.0.0.1:{private.sockets[0].getsockname()[1]}")
        black_and_white = np.stack([np.full(IMAGE_SHAPE, value, np.uint8) for value in (0, 255)])
        answer = await asyncio.to_thread(client.predict_arrays, black_and_white)
        private.close()
        if answer.model_digest != self._settings.model_digest:
            raise DataError(f"Expected an answer of {self._settings.model_digest}, got one of {answer.model_digest}.")

    async def _leave(self, http: HttpServer, server: asyncio.Server) -> None:
        if self._settings.drain_delay:
            self._is_ready = False
            _log.info("Leaving: not ready any more, accepting for another %g s", self._settings.drain_delay)
            await asyncio.sleep(self._settings.drain_delay)
        http.is_leaving = True
        server.close()
        if self._control is not None:
            self._control.close()
        self._accepts_nothing.set()
        _log.info("Leaving: accepting no more connections, %d open", len(http.connections))
        linger = time.monotonic() + self._settings.linger
        grace = linger + self._settings.grace
        while http.connections and time.monotonic() < grace:
            await asyncio.sleep(_POLL_SECONDS)
            if time.monotonic() > linger:
                http.close_idle()

    def _on_signal(self, number: int) -> None:
        """Begin to leave; asked again by Ctrl-C, leave at once."""
        if self._told_to_leave.is_set() and number == signal.SIGINT:
            self._told_to_end.set()
        self._told_to_leave.set()

    def _leave_from_thread(self, loop: asyncio.AbstractEventLoop):
        def leave() -> None:
            loop.call_soon_threadsafe(self._told_to_leave.set)
            self._accepts_nothing.wait()

        return leave

    def _info(self, port: int) -> ServerInfo:
        settings = self._settings
        return ServerInfo(
            pid=os.getpid(),
            host=settings.host,
            port=port,
            model_uri=settings.model_uri,
            model_digest=settings.model_digest,
            model_version=settings.model_version,
            annotations=settings.annotations,
            since=time.time(),
            log_file=settings.log_file,
        )


def _allow_open_files(number: int) -> None:
    """Raise the number of files this process may open, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < number:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (number if hard < 0 else min(number, hard), hard))


def _report(settings: ServerSettings, **message: object) -> None:
    """Tell the process that started this one how it goes, if there is one that listens."""
    if settings.report_fd is not None:
        with contextlib.suppress(OSError):
            os.write(settings.report_fd, json.dumps(message).encode() + b"\n")


def _listener(settings: ServerSettings) -> socket.socket:
    """The socket to serve on: bound, so that a conflict shows at once, but not listening before the model is ready."""
    if settings.fd is None:
        return bind_address(settings.host, settings.port)
    try:
        return socket.socket(fileno=settings.fd)
    except OSError as error:
        raise ConfigError(f"--fd {settings.fd} is not an open socket: {error}.") from error
