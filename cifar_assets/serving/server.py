"""One server process: loads, verifies and warms up the model, then listens; shuts down without losing a request."""

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

from cifar_assets.serving.answers import ServedModel
from cifar_assets.serving.app import App
from cifar_assets.serving.classifier import Classifier, load_classifier
from cifar_assets.serving.http import HttpServer
from cifar_assets.serving.recorder import open_recorder
from cifar_assets.serving.settings import ServerSettings
from resources.errors import ConfigError
from resources.sockets import http_url, listen

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.02
_RETRY_SECONDS = 1.0
_OTHER_FILES = 128
_FLUSH_SECONDS = 2.0
"""Time to write the last records, even if the requests took all of the grace period."""


def run_server(settings: ServerSettings) -> None:
    """Serve until SIGTERM or SIGINT. Returns after a complete drain.

    Raises ConfigError when the address is not available, and what `load_classifier` raises; nothing has listened then.
    """
    classifier = load_classifier(
        settings.model_uri,
        settings.model_digest,
        settings.precision,
        public_key=settings.public_key,
        num_threads=settings.threads,
        batch_images=settings.batch_images,
    )
    try:
        listener = listen(settings.host, settings.port) if settings.fd is None else socket.socket(fileno=settings.fd)
        control = None if settings.control_fd is None else socket.socket(fileno=settings.control_fd)
    except OSError as error:
        raise ConfigError(f"--fd or --control-fd is not an open socket: {error}.") from error
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_files = settings.max_connections + _OTHER_FILES
    if 0 <= allowed < num_files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (num_files if most < 0 else min(num_files, most), most))
    uvloop.run(_serve(settings, classifier, listener, control))


async def _serve(
    settings: ServerSettings, classifier: Classifier, listener: socket.socket, control: socket.socket | None
) -> None:
    loop = asyncio.get_running_loop()
    serving = asyncio.current_task()
    leave_requested = asyncio.Event()

    def on_signal(number: int) -> None:
        """Begin the shutdown; on a second Ctrl-C, exit immediately."""
        if leave_requested.is_set() and number == signal.SIGINT and serving is not None:
            serving.cancel()
        leave_requested.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    manifest = classifier.manifest
    model = ServedModel(
        settings.model_name,
        settings.model_version,
        settings.model_digest,
        manifest.dataset_digest,
        manifest,
        {"precision": settings.precision, "precision_reason": settings.precision_reason},
    )
    recorder = open_recorder(settings, model)
    app = App(model, classifier.run, classifier.num_threads, settings, recorder)
    http = HttpServer(app, settings)
    http.sweep()
    succession = None if control is None else _Succession(control, listener, settings.control_info, leave_requested.set)
    if succession is not None:
        await succession.wait_for_turn(http)
    server = await loop.create_server(http.connect, sock=listener, backlog=2048)
    if succession is not None:
        succession.begin()
    _log.info("Serving model %s on %s", settings.model_digest, http_url(*listener.getsockname()[:2]))
    deadline = 0.0
    with contextlib.suppress(asyncio.CancelledError):
        await leave_requested.wait()
        if settings.drain_delay:
            app.is_ready = False
            _log.info("Draining: no longer ready, accepting connections for another %g s", settings.drain_delay)
            await asyncio.sleep(settings.drain_delay)
        server.close()
        if succession is not None:
            succession.end()
        _log.info("Draining: accepting no more connections, %d open", len(http.connections))
        deadline = time.monotonic() + settings.linger + settings.grace
        await _drain(http, settings)
    http.abort()
    app.close()
    if recorder is not None:
        recorder.close(max(deadline - time.monotonic(), _FLUSH_SECONDS))


async def _drain(http: HttpServer, settings: ServerSettings) -> None:
    http.is_leaving = True
    linger = time.monotonic() + settings.linger
    while http.connections and time.monotonic() < linger + settings.grace:
        await asyncio.sleep(_POLL_SECONDS)
        if time.monotonic() > linger:
            http.close_idle()


class _Succession:
    """The server side of a local deployment, in which each server passes its listening socket to the next.

    A client of the control socket receives the description of this server and a copy of its listening socket, then a
    byte when it stops accepting, and EOF when the process ends. "leave" makes it drain.
    """

    def __init__(self, control: socket.socket, listener: socket.socket, info: str, leave: Callable[[], None]):
        control.setblocking(False)
        self._control = control
        self._listener = listener.dup()
        self._info = json.loads(info)
        self._leave = leave
        self._names: list[str] = []
        """Paths of the control socket: the current one and the one to take over."""
        self._previous: socket.socket | None = None
        """The starter's connection to the previous server, which has to leave."""
        self._connections: list[socket.socket] = []
        self._loop = asyncio.get_running_loop()
        self._answering: asyncio.Task[None]

    async def wait_for_turn(self, http: HttpServer) -> None:
        """Answer requests only on a private port until the starter, which connects first, activates this server."""
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
        """Take over from the previous server, notify the starter, then answer other clients of the control socket."""
        os.replace(*self._names)
        if self._previous:
            with self._previous, contextlib.suppress(OSError):
                self._previous.send(b"leave\n")
        self._notify()
        self._answering = self._loop.create_task(self._answer())

    def end(self) -> None:
        """Notify all clients that this server no longer accepts connections."""
        self._answering.cancel()
        self._control.close()
        self._listener.close()
        self._notify()

    async def _answer(self) -> None:
        while True:
            try:
                connection = await self._accept()
            except OSError:  # too many open files in this process at the moment
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
