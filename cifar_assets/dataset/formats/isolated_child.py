"""The process that reads outside bytes for `isolated`: one question at a time on stdin, its answer the same way."""

import contextlib
import os
import resource
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cifar_assets.dataset.formats.images import pixel_digest, prepare_image
from cifar_assets.dataset.formats.isolated import receive, send
from cifar_assets.dataset.formats.pickles import HostileDataError
from cifar_assets.dataset.index import build_index, dump_index
from cifar_assets.dataset.objects import read_rows
from resources.errors import DataError

_IDLE_SECONDS = 60

_Progress = Callable[[int], None]


def index_file(arguments: dict[str, Any], payload: bytes, progress: _Progress) -> tuple[Any, bytes]:
    """The index of a file's rows."""
    path, kind, split, name = Path(arguments["path"]), arguments["format"], arguments["split"], arguments["name"]
    unread: dict[str, str] = {}
    rows = read_rows(path, kind, split, name, resize=arguments["resize"], unread=unread)
    return None, dump_index(replace(build_index(rows, name, progress), unread=unread))


def digest_picture(arguments: dict[str, Any], payload: bytes, progress: _Progress) -> tuple[Any, bytes]:
    """The pixel digest of the picture that the payload is."""
    return pixel_digest(prepare_image(payload, resize=arguments["resize"])), b""


_OPERATIONS = {function.__name__: function for function in (index_file, digest_picture)}


def main() -> None:
    """Answer until the parent closes the connection or stays silent."""
    parent = Connection(0)
    _limit_memory()
    send(parent, {"ready": True})
    while parent.poll(_IDLE_SECONDS):
        try:
            question, payload = receive(parent)
        except (EOFError, OSError):
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime) + 1 + question["cpu_seconds"]
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        try:
            operation = _OPERATIONS[question["operation"]]
            result, data = operation(question["arguments"], payload, lambda rows: send(parent, {"rows": rows}))
        except MemoryError:
            send(parent, {"memory": True})
            return  # what else failed for want of it is not known
        except DataError as error:
            send(parent, {"refused": str(error), "hostile": isinstance(error, HostileDataError)})
        except Exception as error:
            traceback.print_exc()
            send(parent, {"failed": repr(error)})
        else:
            send(parent, {"result": result}, data)


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # rather this process than its parent
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + int(os.environ["CIFAR_READER_MEMORY"])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


if __name__ == "__main__":
    main()
