"""What the trainer tells Dagster while it runs: through Pipes, when Pipes started it."""

import logging
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from dagster_pipes import PipesContext, PipesEnvVarParamsLoader, open_dagster_pipes

from resources.pipes_store import PipesStoreMessageWriter


class Messages:
    """Tells Dagster of the training; silent where Pipes did not start this process or `wanted` is false."""

    def __init__(self, wanted: bool):
        self._wanted = wanted
        self._context: PipesContext | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if self._wanted and PipesEnvVarParamsLoader().is_dagster_pipes_process():
            writer = PipesStoreMessageWriter()
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
        # a line about the way to Dagster would go that same way
        if record.name != PipesStoreMessageWriter.__module__:
            self._context.log.log(record.levelno, record.getMessage())
