"""The process that reads untrusted files for `isolated`: it answers requests on stdin."""

import contextlib
import os
import resource
import signal
import sys
import traceback
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cifar_assets.dataset.formats.parquet  # noqa: F401 (loaded before memory is limited)
from cifar_assets.dataset.formats.archive import SIDE, survey_archive
from cifar_assets.dataset.formats.encoded import survey_encoded
from cifar_assets.dataset.formats.isolated import OUT_OF_MEMORY, receive, send
from cifar_assets.dataset.formats.rows import Preparation
from cifar_assets.dataset.formats.survey import Survey
from cifar_assets.dataset.index import build_index, dump_index
from cifar_assets.dataset.objects import read_rows
from resources.errors import DataError


def index_file(*, path: str, format: Any, split: str, name: str, how: dict[str, Any]) -> bytes:
    """The index of a file's rows."""
    unread: dict[str, str] = {}
    rows = read_rows(Path(path), format, split, name, Preparation.model_validate(how), unread=unread)
    return dump_index(replace(build_index(rows, name), unread=unread))


def survey_file(*, path: str, format: Any, name: str) -> bytes:
    """What a file says of its classes and pictures."""
    if format == "archive":
        found = survey_archive(Path(path), name)
    elif format == "records":
        found = Survey(smallest=(SIDE, SIDE), largest=(SIDE, SIDE))
    else:
        found = survey_encoded(Path(path), format, name)
    return found.model_dump_json().encode()


def main() -> None:
    """Answer until the parent closes the connection."""
    _limit_memory(int(sys.argv[1]))
    parent = Connection(0)
    send(parent, {"ready": True})
    while True:
        try:
            question, _ = receive(parent)
        except (EOFError, OSError):
            return
        _limit_time(**question["seconds"])
        try:
            read = survey_file if question["task"] == "survey" else index_file
            send(parent, {}, read(**question["arguments"]))
        except MemoryError:
            os._exit(OUT_OF_MEMORY)
        except DataError as error:
            send(parent, {"refused": str(error)})
        except Exception as error:
            traceback.print_exc()
            send(parent, {"failed": repr(error)})


def _limit_time(cpu: int, wall: int) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + cpu
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    signal.alarm(wall)


def _limit_memory(num_bytes: int) -> None:
    """Called once, before the first file, so that memory left by a file does not raise the limit of the next."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # kill this process rather than its parent
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + num_bytes
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


if __name__ == "__main__":
    main()
