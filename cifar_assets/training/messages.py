"""What the trainer tells Dagster while it runs: through Pipes, when Pipes started it."""

import logging
from contextlib import ExitStack
from types import TracebackType
from typing import IO, Any, Self

from dagster_pipes import (
    PipesBlobStoreMessageWriter,
    PipesBlobStoreMessageWriterChannel,
    PipesContext,
    PipesDefaultMessageWriter,
    PipesEnvVarParamsLoader,
    PipesMessageWriter,
    PipesParams,
    open_dagster_pipes,
)

from cifar_assets.object_store import ObjectStore, open_store

STORE_URI_PARAM = "store_uri"
"""Message parameter of a launcher that reads messages from an object store: URI of a folder of this launch's own."""


class StoreMessageChannel(PipesBlobStoreMessageWriterChannel):
    """Writes messages as objects `<number>.json`, numbered from 1, one JSON message a line.

    A restarted process goes on counting where the one before it ended.
    """

    def __init__(self, store: ObjectStore, interval_seconds: float):
        super().__init__(interval=interval_seconds)
        self._store = store
        numbers = [info.key.removesuffix(".json") for info in store.list()]
        self._last = max((int(number) for number in numbers if number.isdigit()), default=0)

    def upload_messages_chunk(self, payload: IO[str], index: int) -> None:
        self._store.write(f"{self._last + index}.json", payload.read().encode())


class StoreMessageWriter(PipesBlobStoreMessageWriter[StoreMessageChannel]):
    """Sends Pipes messages through the object store that the launcher names."""

    def make_channel(self, params: PipesParams) -> StoreMessageChannel:
        return StoreMessageChannel(open_store(params[STORE_URI_PARAM]), self.interval)


class Messages:
    """Tells Dagster of the training; silent where Pipes did not start this process or `wanted` is false."""

    def __init__(self, wanted: bool):
        self._wanted = wanted
        self._context: PipesContext | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        loader = PipesEnvVarParamsLoader()
        if self._wanted and loader.is_dagster_pipes_process():
            params = loader.load_messages_params()
            writer: PipesMessageWriter[Any] = (
                StoreMessageWriter(interval=2) if STORE_URI_PARAM in params else PipesDefaultMessageWriter()
            )
            self._context = self._stack.enter_context(open_dagster_pipes(message_writer=writer))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def send(self, kind: str, **values: Any) -> None:
        """One custom message of the kind given."""
        if self._context is not None:
            self._context.report_custom_message({"type": kind, **values})

    def handler(self) -> logging.Handler | None:
        """A logging handler that shows log lines in Dagster; None where there is no Dagster."""
        return None if self._context is None else _ForwardToDagster(self._context)


class _ForwardToDagster(logging.Handler):
    def __init__(self, context: PipesContext):
        super().__init__(logging.INFO)
        self._context = context

    def emit(self, record: logging.LogRecord) -> None:
        self._context.log.log(record.levelno, record.getMessage())
