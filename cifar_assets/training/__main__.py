"""Command line: `python -m cifar_assets.training --spec FILE`, or the spec on standard input or in CIFAR_JOB_SPEC."""

import argparse
import io
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cifar_assets.contracts import EXIT_BAD_SPEC, EXIT_RESUME, JOB_SPEC_VARIABLE
from cifar_assets.training.spec import JobSpec, parse_spec, read_spec
from cifar_assets.training.stopping import StopSignal, TrainingStopped
from resources.errors import ConfigError, DataError, ExplainedError, ObjectNotFoundError, StoreError

_LOG = logging.getLogger("cifar_assets.training")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one training job and return the exit code: 0, EXIT_BAD_SPEC, EXIT_RESUME, or 1."""
    options = _parser().parse_args(arguments)
    log = _set_up_logging()
    try:
        spec = _load_spec(options.spec)
        _run(spec, StopSignal(), log)
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
        _LOG.exception("The training failed for a reason it does not know.")
        return 1
    return 0


def _run(spec: JobSpec, stop: StopSignal, log: io.StringIO) -> None:
    # torch takes seconds to load: a spec that is wrong is refused before
    from cifar_assets.training.job import clear_checkpoints, run_job
    from cifar_assets.training.messages import Messages

    stopped: TrainingStopped | None = None
    project = logging.getLogger("cifar_assets")
    with Messages(wanted=_is_first()) as messages:
        if (handler := messages.handler()) is not None:
            project.addHandler(handler)
        try:
            run_job(spec, stop, messages, log)
        except TrainingStopped as error:
            # leaves Pipes as a success does: the exit code says that there is more to come
            stopped = error
        finally:
            # what is logged from here on comes after Pipes is closed, which takes no more
            if handler is not None:
                project.removeHandler(handler)
    if stopped is not None:
        raise stopped
    if _is_first():
        clear_checkpoints(spec)


def _load_spec(source: str | None) -> JobSpec:
    if source == "-":
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise ConfigError(
                f"Several processes cannot read one standard input: use --spec FILE or {JOB_SPEC_VARIABLE}."
            )
        return parse_spec(sys.stdin.buffer.read(), "standard input")
    if source is not None:
        return read_spec(Path(source))
    if JOB_SPEC_VARIABLE in os.environ:
        return parse_spec(os.environ[JOB_SPEC_VARIABLE], f"the environment variable {JOB_SPEC_VARIABLE}")
    raise ConfigError(
        f"There is no job spec: give --spec FILE, --spec - or the environment variable {JOB_SPEC_VARIABLE}."
    )


def _set_up_logging() -> io.StringIO:
    """Log lines of this project go to standard output and to the buffer returned.

    Ranks other than the first only say that they joined, and warn.
    """
    buffer = io.StringIO()
    level = logging.INFO if _is_first() else logging.WARNING
    project = logging.getLogger("cifar_assets")
    project.setLevel(level)
    logging.getLogger("cifar_assets.training.distributed").setLevel(logging.INFO)
    for stream, form in ((sys.stdout, "%(message)s"), (buffer, "%(asctime)s %(levelname)s %(message)s")):
        handler = logging.StreamHandler(stream)
        handler.setFormatter(logging.Formatter(form))
        project.addHandler(handler)
    return buffer


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cifar_assets.training", description="Run one training job.")
    parser.add_argument(
        "--spec", metavar="FILE", help=f"job spec in JSON, - for standard input; else {JOB_SPEC_VARIABLE} holds it"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
