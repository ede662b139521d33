"""Command line: `python -m cifar_assets.training --spec FILE`, or the spec on standard input or in CIFAR_JOB_SPEC."""

import argparse
import io
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from dagster_pipes import PipesEnvVarParamsLoader, open_dagster_pipes

from cifar_assets.training.spec import JobSpec, parse_spec
from resources.errors import ConfigError, DataError, ExplainedError, ObjectNotFoundError, StoreError
from resources.pipes_store import PipesStoreMessageWriter
from resources.trainer.contract import EXIT_BAD_SPEC, EXIT_RESUME, JOB_SPEC_VARIABLE

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
        return run(_load_spec(options.spec), log)
    except ExplainedError as error:
        _LOG.error("%s", error)
        if isinstance(error, ConfigError | DataError | ObjectNotFoundError):
            return EXIT_BAD_SPEC
        return EXIT_RESUME if isinstance(error, StoreError) and error.transient else 1
    except Exception:
        _LOG.exception("The training failed for an unexpected reason.")
        return 1


def run(spec: JobSpec, log: io.StringIO) -> int:
    """Run a job, and remove its checkpoints once Dagster has received its result. Returns 0 or EXIT_RESUME."""
    # torch takes seconds to load: an invalid spec is refused before that
    from cifar_assets.training.distributed import StopSignal, TrainingStopped
    from cifar_assets.training.job import clear_checkpoints, run_job

    with ExitStack() as stack:
        send = None
        if _is_rank_0() and PipesEnvVarParamsLoader().is_dagster_pipes_process():
            pipes = stack.enter_context(open_dagster_pipes(message_writer=PipesStoreMessageWriter()))
            send = pipes.report_custom_message
        try:
            run_job(spec, StopSignal(), send or (lambda message: None), log)
        except TrainingStopped as stopped:
            # closes Pipes like a success: the exit code says that the training is not finished
            _LOG.warning("%s", stopped)
            return EXIT_RESUME
    if _is_rank_0():
        clear_checkpoints(spec)
    return 0


def _load_spec(source: str | None) -> JobSpec:
    if source is None:
        if JOB_SPEC_VARIABLE not in os.environ:
            raise ConfigError(f"There is no job spec: pass --spec FILE or --spec -, or set {JOB_SPEC_VARIABLE}.")
        return parse_spec(os.environ[JOB_SPEC_VARIABLE], f"the environment variable {JOB_SPEC_VARIABLE}")
    if source == "-":
        return parse_spec(sys.stdin.buffer.read(), "standard input")
    try:
        return parse_spec(Path(source).read_bytes(), source)
    except OSError as error:
        raise ConfigError(f"Job spec {source} cannot be read: {error}.") from error


def _set_up_logging() -> io.StringIO:
    """Send this project's log lines to standard output and to the returned buffer.

    Ranks other than 0 log only that they joined, and warnings.
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
