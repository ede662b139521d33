"""The process that reads outside bytes for `isolated`: a fork of it answers each question that comes on stdin."""

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


def index_file(*, path: str, format: Any, split: str, name: str, resize: bool) -> bytes:
    """The index of a file's rows."""
    unread: dict[str, str] = {}
    index = build_index(read_rows(Path(path), format, split, name, resize=resize, unread=unread), name)
    return dump_index(replace(index, unread=unread))


def main() -> None:
    """Answer until the parent closes the connection, or a file kills its reader: then end as that did."""
    parent = Connection(0)
    send(parent, {"ready": True})
    while True:
        try:
            question, _ = receive(parent)
        except (EOFError, OSError):
            return
        if not (reader := os.fork()):
            _answer(parent, question)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1])
        if status:
            os._exit(status % 256)


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
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    signal.alarm(wall)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if sys.platform == "linux" and soft == resource.RLIM_INFINITY:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, hard))


if __name__ == "__main__":
    main()
