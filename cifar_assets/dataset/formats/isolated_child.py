"""The process that reads outside bytes for `isolated`: forks of it answer the questions that come on stdin."""

import os
import resource
import signal
import sys
import traceback
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cifar_assets.dataset.formats.isolated import OUT_OF_MEMORY, receive, send
from cifar_assets.dataset.index import build_index, dump_index
from cifar_assets.dataset.objects import read_rows
from resources.errors import DataError

_FILES_PER_READER = 100
"""A fork costs as much as reading ten pictures."""
_CLOSED = 87
"""Exit status of a reader whose parent asks nothing more."""


def index_file(*, path: str, format: Any, split: str, name: str, resize: bool) -> bytes:
    """The index of a file's rows."""
    unread: dict[str, str] = {}
    index = build_index(read_rows(Path(path), format, split, name, resize=resize, unread=unread), name)
    return dump_index(replace(index, unread=unread))


def main() -> None:
    """Answer until the parent closes the connection, or a file kills its reader: then end as that did."""
    parent = Connection(0)
    send(parent, {"ready": True})
    status = 0
    while not status:
        if not (reader := os.fork()):
            _answer_some(parent)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1])
    os._exit(status % 256)


def _answer_some(parent: Connection) -> None:
    for _ in range(_FILES_PER_READER):
        try:
            question, _ = receive(parent)
        except (EOFError, OSError):
            os._exit(_CLOSED)
        _answer(parent, question)


def _answer(parent: Connection, question: Mapping[str, Any]) -> None:
    try:
        _limit(**question["limits"])
        send(parent, {}, index_file(**question["arguments"]))
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except DataError as error:
        send(parent, {"refused": str(error)})
    except Exception as error:
        traceback.print_exc()
        send(parent, {"failed": repr(error)})


def _limit(memory: int, cpu: int, wall: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + cpu
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    signal.alarm(wall)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (_least(pages * resource.getpagesize() + memory, hard), hard))


def _least(wanted: int, hard: int) -> int:
    return wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)


if __name__ == "__main__":
    main()
