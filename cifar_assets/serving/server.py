"""One server process: load, verify, warm up, then listen; leave without losing a request."""

import asyncio
import contextlib
import json
import logging
import os
import resource
import signal
import socket
import time
from collections.abc import Callable

import uvloop

from cifar_assets.serving.app import App
from cifar_assets.serving.classifier import Classifier, load_classifier
from cifar_assets.serving.http import HttpServer
from cifar_assets.serving.settings import ServerSettings
from resources.errors import ConfigError
from resources.sockets import http_url, listen

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.02
_RETRY_SECONDS = 1.0
_OTHER_FILES = 128


def run_server(settings: ServerSettings) -> None:
    """Serve until SIGTERM or SIGINT. Returns after a complete drain.

    Raises ConfigError when the address cannot be had, and what `load_classifier` raises; then nothing ever listened.
    """
    limits = settings.limits
    classifier = load_classifier(
        settings.model_uri, settings.model_digest, num_threads=settings.threads, batch_images=limits.batch_images
    )
    try:
        listener = listen(settings.host, settings.port) if settings.fd is None else socket.socket(fileno=settings.fd)
        control = None if settings.control_fd is None else socket.socket(fileno=settings.control_fd)
    except OSError as error:
        raise ConfigError(f"--fd or --control-fd is not an open socket: {error}.") from error
    _allow_open_files(limits.max_connections + _OTHER_FILES)
    uvloop.run(_Server(settings, listener).serve(classifier, control))


class _Server:
    """A server from its first connection to its last."""

    def __init__(self, settings: ServerSettings, listener: socket.socket):
        self._settings = settings
        self._listener = listener
        self._is_ready = True
        self._leave_requested = asyncio.Event()
        self._drain: asyncio.Task[None] | None = None

    async def serve(self, classifier: Classifier, control: socket.socket | None) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        app = App(self._settings.identity, classifier.run, self._settings.limits, lambda: self._is_ready)
        http = HttpServer(app, self._settings.limits)
        http.sweep()
        succession = None
        if control is not None:
            leave = self._leave_requested.set
            succession = _Succession(control, self._listener, self._settings.control_info, leave)
            await succession.wait_for_turn(http)
        server = await loop.create_server(http.connect, sock=self._listener, backlog=2048)
        if succession is not None:
            succession.begin()
        _log.info("Serving model %s on %s", self._settings.model_digest, http_url(*self._listener.getsockname()[:2]))
        await self._leave_requested.wait()
        self._drain = loop.create_task(self._leave(http, server, succession))
        with contextlib.suppress(asyncio.CancelledError):
            await self._drain
        http.abort()
        app.close()

    async def _leave(self, http: HttpServer, server: asyncio.Server, succession: "_Succession | None") -> None:
        if self._settings.drain_delay:
            self._is_ready = False
            _log.info("Draining: not ready any more, accepting for another %g s", self._settings.drain_delay)
            await asyncio.sleep(self._settings.drain_delay)
        http.is_leaving = True
        server.close()
        if succession is not None:
            succession.end()
        _log.info("Draining: accepting no more connections, %d open", len(http.connections))
        linger = time.monotonic() + self._settings.linger
        grace = linger + self._settings.grace
        while http.connections and time.monotonic() < grace:
            await asyncio.sleep(_POLL_SECONDS)
            if time.monotonic() > linger:
                http.close_idle()

    def _on_signal(self, number: int) -> None:
        """Begin to leave; asked again by Ctrl-C, leave at once."""
        if self._drain is not None and number == signal.SIGINT:
            self._drain.cancel()
        self._leave_requested.set()


class _Succession:
    """The server's end of a local deployment, whose servers hand on one listening socket.

    Whoever connects to the control socket gets what is known of this server and a copy of its listening socket, then a
    byte when it stops accepting, and the end of the connection when the process ends. "leave" makes it drain.
    """

    def __init__(self, control: socket.socket, listener: socket.socket, info: str, leave: Callable[[], None]):
        control.setblocking(False)
        self._control = control
        self._listener = listener.dup()
        self._info = json.loads(info)
        self._leave = leave
        self._names: list[str] = []
        """Of the control socket: the present one and the one to take."""
        self._previous: socket.socket | None = None
        """The starter's connection to the server before, which has to leave."""
        self._connections: list[socket.socket] = []
        self._loop = asyncio.get_running_loop()
        self._answering: asyncio.Task[None]

    async def wait_for_turn(self, http: HttpServer) -> None:
        """Answer requests on a private port only, until the starter, which connects first, lets this server begin."""
        private = await self._loop.create_server(http.connect, "127.0.0.1", 0)
        self._info = {"process_id": os.getpid(), "private_port": private.sockets[0].getsockname()[1], **self._info}
        starter = await self._accept()
        starter.setblocking(True)
        try:
            names, descriptors, _, _ = await asyncio.to_thread(socket.recv_fds, starter, 1 << 16, 1)
            self._names = json.loads(names)
        except (OSError, ValueError) as error:
            raise ConfigError("The process that started this server has ended.") from error
        starter.setblocking(False)
        if descriptors:
            self._previous = socket.socket(fileno=descriptors[0])
        self._loop.add_reader(starter, self._hear, starter)
        private.close()

    def begin(self) -> None:
        """Take the place of the server before, tell the starter so, and answer everyone else who asks."""
        os.replace(*self._names)
        if self._previous:
            with self._previous, contextlib.suppress(OSError):
                self._previous.send(b"leave\n")
        self._notify()
        self._answering = self._loop.create_task(self._answer())

    def end(self) -> None:
        """Let everyone know that this server accepts nothing more."""
        self._answering.cancel()
        self._control.close()
        self._listener.close()
        self._notify()

    async def _answer(self) -> None:
        while True:
            try:
                connection = await self._accept()
            except OSError:  # this process has too many open files at the moment
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                self._loop.add_reader(connection, self._hear, connection)

    async def _accept(self) -> socket.socket:
        connection, _ = await self._loop.sock_accept(self._control)
        self._connections.append(connection)
        with contextlib.suppress(OSError):
            socket.send_fds(connection, [json.dumps(self._info).encode()], [self._listener.fileno()])
        return connection

    def _hear(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if connection.recv(16) == b"leave\n":
                self._leave()
                return
        self._loop.remove_reader(connection)
        self._connections.remove(connection)
        connection.close()

    def _notify(self) -> None:
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.send(b"\n")


def _allow_open_files(number: int) -> None:
    """Raise the number of files this process may open, as far as the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < number:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (number if hard < 0 else min(number, hard), hard))
