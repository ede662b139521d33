"""Latency and throughput of the server, batched against one image per run of the model, side by side.

    python tests/benchmarks/serving_latency.py [--recipe seed | --model-uri URI --model-digest D]

Two servers of the same model run on loopback: one as deployed, one with `--batch-images 1`. Rounds alternate between
them, so that both see the same machine; the figures are over all rounds. It ends after rounds x levels x 2 x seconds.
"""

import argparse
import contextlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cifar_assets.object_store import FolderStore
from tests.unit.serving.server_process import ServerProcess, ask_on, run_server
from tests.unit.serving.tiny_model import store_tiny_model

LEVELS = (1, 8, 32)
PIXELS = np.random.default_rng(0).integers(0, 256, (1, 3, 32, 32), dtype=np.uint8).tobytes()
HEADER = json.dumps(
    {
        "inputs": [
            {"name": "images", "datatype": "UINT8", "shape": [1, 3, 32, 32], "parameters": {"binary_data_size": 3072}}
        ]
    }
).encode()
HEADERS = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(HEADER))}


def untrained_onnx(recipe: str) -> bytes:
    """The recipe's network with the weights it starts from: as costly to run as a trained one."""
    from cifar_assets.training.export import onnx_bytes
    from cifar_assets.training.networks import Classifier, build_network
    from cifar_assets.training.recipes import get_recipe

    return onnx_bytes(Classifier(build_network(get_recipe(recipe)), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)))


def measure(server: ServerProcess, num_clients: int, seconds: float) -> list[float]:
    """Latencies, in seconds, of all answers that clients in a closed loop got within the time."""
    latencies: list[float] = []
    deadline = time.perf_counter() + seconds

    def work() -> None:
        own: list[float] = []
        with contextlib.closing(server.connect()) as connection:
            while (started := time.perf_counter()) < deadline:
                answer = ask_on(connection, "POST", "/v2/models/cifar10/infer", HEADER + PIXELS, HEADERS)
                if answer.status != 200:
                    raise SystemExit(f"The server answered {answer.status}: {answer.body[:200]!r}")
                own.append(time.perf_counter() - started)
        latencies.extend(own)

    threads = [threading.Thread(target=work) for _ in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return latencies


@contextlib.contextmanager
def two_servers(uri: str, digest: str, folder: Path) -> Iterator[dict[str, ServerProcess]]:
    threads = ("--threads", str(os.cpu_count() or 1))
    for name in ("batched", "single"):
        (folder / name).mkdir()
    with (
        run_server(uri, digest, folder / "batched", *threads) as batched,
        run_server(uri, digest, folder / "single", *threads, "--batch-images", "1") as single,
    ):
        yield {"batched": batched, "single": single}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-uri")
    parser.add_argument("--model-digest")
    parser.add_argument("--recipe", default="seed", help="network to run untrained: seed, resnet18 or fast")
    parser.add_argument("--rounds", type=int, default=5, choices=range(1, 51))
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        uri, digest = options.model_uri, options.model_digest
        if uri is None:
            uri, digest = store_tiny_model(FolderStore(folder / "models"), onnx_bytes=untrained_onnx(options.recipe))
        print(f"{os.cpu_count()} cores, {options.rounds} rounds of {options.seconds:g} s, one image per request")
        print(f"{'clients':>7} {'server':>8} {'p50 ms':>8} {'p99 ms':>8} {'req/s':>8} {'n':>7}")
        with two_servers(uri, digest, folder) as servers:
            for num_clients in LEVELS:
                compare(servers, num_clients, options.rounds, min(options.seconds, 30))


def compare(servers: dict[str, ServerProcess], num_clients: int, rounds: int, seconds: float) -> None:
    """Print one level of load: each server's figures, and the ratio of batched to single."""
    latencies: dict[str, list[float]] = {name: [] for name in servers}
    for server in servers.values():
        measure(server, num_clients, min(0.5, seconds))
    for index in range(rounds):
        order = list(servers) if index % 2 == 0 else list(reversed(servers))
        for name in order:
            latencies[name] += measure(servers[name], num_clients, seconds)
    figures = {}
    for name, values in latencies.items():
        p50, p99 = np.percentile(values, [50, 99]) * 1000
        figures[name] = (p50, p99, len(values) / (rounds * seconds))
        print(f"{num_clients:>7} {name:>8} {p50:>8.2f} {p99:>8.2f} {figures[name][2]:>8.0f} {len(values):>7}")
    ratios = [batched / single for batched, single in zip(figures["batched"], figures["single"], strict=True)]
    print(f"{num_clients:>7} {'ratio':>8} {ratios[0]:>8.2f} {ratios[1]:>8.2f} {ratios[2]:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
