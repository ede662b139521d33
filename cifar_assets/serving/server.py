"""One server process: load, verify, warm up, then listen; leave without losing a request."""

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn

from cifar_assets.errors import CifarError, ConfigError
from cifar_assets.serving.admission import Admission
from cifar_assets.serving.classifier import Classifier, load_classifier
from cifar_assets.serving.endpoints import CifarRESTServer
from cifar_assets.serving.kserve_sdk import ModelServer, app
from cifar_assets.serving.memory import return_large_blocks, trim
from cifar_assets.serving.ports import bind_address
from cifar_assets.serving.predictor import CifarModel
from cifar_assets.serving.settings import ServerSettings

_log = logging.getLogger(__name__)

_KEEP_ALIVE_SECONDS = 65


def run_server(settings: ServerSettings) -> None:
    """Serve until SIGTERM or SIGINT. Returns after a complete drain.

    Raises ConfigError when the address cannot be had, and what `load_classifier` raises; then nothing ever listened.
    """
    return_large_blocks()
    report = Reporter(settings.report_fd)
    try:
        listener = _listener(settings)
        classifier = load_classifier(
            settings.model_uri,
            settings.model_digest,
            num_threads=settings.threads,
            batch_images=settings.limits.batch_images,
        )
    except Exception as error:
        is_own = isinstance(error, CifarError)
        report.send(state="failed", reason=str(error) if is_own else f"{type(error).__name__}: {error}")
        raise
    trim()
    CifarServer(settings, listener, report).start_with(classifier)


class CifarServer(ModelServer):
    """kserve's model server on a socket of our own, with one model and the door in front of it."""

    def __init__(self, settings: ServerSettings, listener: socket.socket, report: "Reporter"):
        super().__init__(http_port=settings.port, workers=1, enable_grpc=False, enable_latency_logging=False)
        self._settings = settings
        self._listener = listener
        self._report = report

    def start_with(self, classifier: Classifier) -> None:
        """Serve the classifier until told to stop."""
        model = CifarModel(self._settings.identity, classifier, self._settings.limits)
        self.register_model(model)
        is_leaving = threading.Event()
        rest = CifarRESTServer(
            "unused",
            self.dataplane,
            self.model_repository_extension,
            self.http_port,
            identity=model.identity,
            is_ready=lambda: model.ready and not is_leaving.is_set(),
        )
        rest.create_application()
        door = Admission(app, self._settings.limits, model.batcher.retry_after)
        config = uvicorn.Config(
            door,  # pyright: ignore[reportArgumentType] - an ASGI application with looser scope types
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            backlog=2048,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=int(self._settings.grace) or 1,
        )
        server = DrainingServer(config, self._settings, door, is_leaving, self._report)
        try:
            server.run(sockets=[self._listener])
        finally:
            model.stop()


class DrainingServer(uvicorn.Server):
    """Uvicorn, told to stop in three steps: not ready but accepting; not accepting; no open connections."""

    def __init__(
        self,
        config: uvicorn.Config,
        settings: ServerSettings,
        door: Admission,
        is_leaving: threading.Event,
        report: "Reporter",
    ):
        super().__init__(config)
        self._settings = settings
        self._door = door
        self._is_leaving = is_leaving
        self._report = report
        self._drain: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if self._settings.lifeline_fd is not None:
            _when_closed(self._settings.lifeline_fd, self._begin_from_thread)
        host, port = (sockets or [])[0].getsockname()[:2]
        _log.info("Serving model %s on http://%s:%d", self._settings.model_digest, host, port)
        self._report.send(state="ready", host=host, port=port, pid=os.getpid())

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to leave; asked again by Ctrl-C, leave at once."""
        if self._drain is not None and sig == signal.SIGINT:
            self.should_exit = self.force_exit = True
        else:
            self._begin_from_thread()

    def _begin_from_thread(self) -> None:
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin)

    def _begin(self) -> None:
        if self._drain is None:
            self._drain = asyncio.get_running_loop().create_task(self._leave())

    async def _leave(self) -> None:
        if self._settings.drain_delay:
            self._is_leaving.set()
            _log.info("Leaving: not ready any more, accepting for another %g s", self._settings.drain_delay)
            await asyncio.sleep(self._settings.drain_delay)
        self._door.leaving = True
        for server in self.servers:
            server.close()
        _log.info("Leaving: accepting no more connections, %d open", len(self.server_state.connections))
        self._report.send(state="draining")
        deadline = asyncio.get_running_loop().time() + self._settings.linger
        while self.server_state.connections and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)
        self.should_exit = True


class Reporter:
    """Tells the process that started this one how it goes, if there is one that listens."""

    def __init__(self, fd: int | None):
        self._fd = fd

    def send(self, **message: object) -> None:
        if self._fd is not None:
            with contextlib.suppress(OSError):
                os.write(self._fd, json.dumps(message).encode() + b"\n")


def _listener(settings: ServerSettings) -> socket.socket:
    """The socket to serve on: bound, so that a conflict shows at once, but not listening before the model is ready."""
    if settings.fd is not None:
        try:
            return socket.socket(fileno=settings.fd)
        except OSError as error:
            raise ConfigError(f"--fd {settings.fd} is not an open socket: {error}.") from error
    return bind_address(settings.host, settings.port)


def _when_closed(fd: int, call: Callable[[], None]) -> None:
    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(fd, 1024):
                pass
        call()

    threading.Thread(target=wait, name="lifeline", daemon=True).start()
