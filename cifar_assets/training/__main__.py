"""Command line: `python -m cifar_assets.training --spec FILE`, or the spec on standard input or in CIFAR_JOB_SPEC."""

import argparse
import io
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dagster_pipes import PipesContext, PipesEnvVarParamsLoader, open_dagster_pipes

from cifar_assets.contracts import EXIT_BAD_SPEC, EXIT_RESUME, JOB_SPEC_VARIABLE
from cifar_assets.training.spec import JobSpec, parse_spec
from cifar_assets.training.stopping import StopSignal, TrainingStopped
from resources.errors import ConfigError, DataError, ExplainedError, ObjectNotFoundError, StoreError
from resources.pipes_store import PipesStoreMessageWriter

_LOG = logging.getLogger("cifar_assets.training")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one training job and return the exit code: 0, EXIT_BAD_SPEC, EXIT_RESUME, or 1."""
    parser = argparse.ArgumentParser(prog="python -m cifar_assets.training", description="Run one training job.")
    parser.add_argument(
        "--spec", metavar="FILE", help=f"job spec in JSON, - for standard input; else {JOB_SPEC_VARIABLE} holds it"
    )
    options = parser.parse_args(arguments)
    log = _set_up_logging()
    try:
        run(_load_spec(options.spec), log)
    except TrainingStopped as stopped:
        _LOG.warning("%s", stopped)
        return EXIT_RESUME
    except (ConfigError, DataError, ObjectNotFoundError) as error:
        _LOG.error("%s", error)
        return EXIT_BAD_SPEC
    except ExplainedError as error:
        _LOG.error("%s", error)
        return EXIT_RESUME if isinstance(error, StoreError) and error.transient else 1
    except Exception:
        _LOG.exception("The training failed for an unknown reason.")
        return 1
    return 0


def run(spec: JobSpec, log: io.StringIO) -> None:
    """Run a job, and remove its checkpoints once Dagster has received its result."""
    # torch takes seconds to load: a wrong spec is refused before
    from cifar_assets.training.job import clear_checkpoints, run_job

    stopped: TrainingStopped | None = None
    with _dagster() as pipes:

        def send(kind: str, **values: Any) -> None:
            if pipes is not None:
                pipes.report_custom_message({"type": kind, **values})

        try:
            run_job(spec, StopSignal(), send, log)
        except TrainingStopped as error:
            # leaves Pipes as a success does: the exit code says that there is more to come
            stopped = error
    if stopped is not None:
        raise stopped
    if _is_rank_0():
        clear_checkpoints(spec)


@contextmanager
def _dagster() -> Iterator[PipesContext | None]:
    """The connection to Dagster, which gets warnings too; None where Pipes did not start this process."""
    if not _is_rank_0() or not PipesEnvVarParamsLoader().is_dagster_pipes_process():
        yield None
        return
    with open_dagster_pipes(message_writer=PipesStoreMessageWriter()) as pipes:
        handler = _ForwardToDagster(pipes)
        logging.getLogger("cifar_assets").addHandler(handler)
        try:
            yield pipes
        finally:
            # Pipes accepts nothing more after it is closed
            logging.getLogger("cifar_assets").removeHandler(handler)


class _ForwardToDagster(logging.Handler):
    """Warnings only: Dagster shows this process's output too, and would show each epoch twice."""

    def __init__(self, pipes: PipesContext):
        super().__init__(logging.WARNING)
        self._pipes = pipes

    def emit(self, record: logging.LogRecord) -> None:
        self._pipes.log.log(record.levelno, record.getMessage())


def _load_spec(source: str | None) -> JobSpec:
    if source == "-":
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise ConfigError(
                f"Several processes cannot read one standard input: use --spec FILE or {JOB_SPEC_VARIABLE}."
            )
        return parse_spec(sys.stdin.buffer.read(), "standard input")
    if source is not None:
        try:
            return parse_spec(Path(source).read_bytes(), source)
        except OSError as error:
            raise ConfigError(f"Job spec {source} cannot be read: {error}.") from error
    if JOB_SPEC_VARIABLE in os.environ:
        return parse_spec(os.environ[JOB_SPEC_VARIABLE], f"the environment variable {JOB_SPEC_VARIABLE}")
    raise ConfigError(
        f"There is no job spec: give --spec FILE, --spec - or the environment variable {JOB_SPEC_VARIABLE}."
    )


def _set_up_logging() -> io.StringIO:
    """Log lines of this project go to standard output and to the buffer returned.

    Ranks other than 0 only say that they joined, and warn.
    """
    buffer = io.StringIO()
    project = logging.getLogger("cifar_assets")
    project.setLevel(logging.INFO if _is_rank_0() else logging.WARNING)
    logging.getLogger("cifar_assets.training.distributed").setLevel(logging.INFO)
    for stream, form in ((sys.stdout, "%(message)s"), (buffer, "%(asctime)s %(levelname)s %(message)s")):
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter(form))
        project.addHandler(handler)
    return buffer


def _is_rank_0() -> bool:
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    sys.exit(main())
