"""The server's memory over very many requests of every kind, valid and not.

    python tests/benchmarks/serving_endurance.py [--requests 200000] [--recipe NAME]

It prints resident memory at twenty points, and ends with 1 when the second half grew by more than `--allowed-mib`.
"""

import argparse
import base64
import contextlib
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import psutil

from resources.object_store import FolderStore
from tests.benchmarks.serving_latency import HEADER, HEADERS, PIXELS, add_model_options, model_to_serve, picture
from tests.unit.serving.server_process import ServerProcess, ask_on, form, run_server

PREDICT, INFER = "/v1/models/cifar10:predict", "/v2/models/cifar10/infer"
JSON = {"Content-Type": "application/json"}
NUM_CLIENTS = 8


def requests() -> list[tuple[int, str, str, bytes | None, dict[str, str]]]:
    """How often, method, path, body and headers."""
    small, large = picture(32), picture(600)
    one, many = form(("image", small)), form(*[("image", small)] * 16)
    text = base64.b64encode(small).decode()
    instances = json.dumps({"instances": [text, {"b64": text}]}).encode()
    arrays = json.dumps({"instances": [[[[index % 256] * 3 for index in range(32)]] * 32]}).encode()
    return [
        (40, "POST", PREDICT, one[0], {"Content-Type": one[1]}),
        (20, "POST", INFER, HEADER + PIXELS, HEADERS),
        (5, "POST", PREDICT, instances, JSON),
        (3, "POST", PREDICT, arrays, JSON),
        (2, "POST", PREDICT, many[0], {"Content-Type": many[1]}),
        (1, "POST", PREDICT, *_typed(form(("image", large)))),
        (5, "POST", PREDICT, one[0][:-200], {"Content-Type": one[1]}),
        (5, "POST", PREDICT, b'{"instances": [[[[', JSON),
        (5, "POST", INFER, b'{"inputs": [{"name": "images", "shape": [1000000000, 3, 32, 32]}]}', JSON),
        (5, "GET", "/v2/health/ready", None, {}),
        (2, "GET", "/metrics", None, {}),
        (3, "GET", "/nothing", None, {}),
        (2, "DELETE", PREDICT, None, {}),
        (1, "POST", PREDICT, bytes(100_000), JSON),
        (1, "GET", "/", None, {f"X-{index}": "x" * 100 for index in range(101)}),
    ]


def _typed(body: tuple[bytes, str]) -> tuple[bytes, dict[str, str]]:
    return body[0], {"Content-Type": body[1]}


def work(server: ServerProcess, num_requests: int, seed: int, statuses: Counter[int]) -> None:
    """One client: random requests, and now and then a new connection."""
    choices, generator = requests(), random.Random(seed)
    weights = [choice[0] for choice in choices]
    connection = server.connect()
    for _ in range(num_requests):
        _, method, path, body, headers = generator.choices(choices, weights)[0]
        answer = ask_on(connection, method, path, body, headers)
        statuses[answer.status] += 1
        if answer.headers.get("Connection") == "close" or generator.random() < 0.02:
            connection.close()
    connection.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--allowed-mib", type=float, default=8.0)
    options = parser.parse_args()
    statuses: Counter[int] = Counter()
    sizes: list[float] = []
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        uri, digest = model_to_serve(options, FolderStore(Path(name) / "models"))
        server = stack.enter_context(run_server(uri, digest, Path(name)))
        process = psutil.Process(server.process.pid)
        started = time.monotonic()
        for step in range(20):
            each = options.requests // 20 // NUM_CLIENTS
            threads = [
                threading.Thread(target=work, args=(server, each, step * NUM_CLIENTS + index, statuses))
                for index in range(NUM_CLIENTS)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            sizes.append(process.memory_info().rss / 2**20)
            print(
                f"{sum(statuses.values()):>8} requests {sizes[-1]:8.1f} MiB {time.monotonic() - started:8.0f} s",
                flush=True,
            )
        assert "Traceback" not in server.log
    growth = max(sizes[10:]) - max(sizes[:10])
    print(f"statuses {dict(sorted(statuses.items()))}; the second half grew by {growth:.1f} MiB")
    return 0 if growth <= options.allowed_mib and not any(status >= 500 for status in statuses) else 1


if __name__ == "__main__":
    sys.exit(main())
