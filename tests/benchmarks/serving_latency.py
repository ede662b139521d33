"""Latency and throughput of the server, batched against one image per run of the model, side by side.

    python tests/benchmarks/serving_latency.py [--recipe NAME | --model-uri URI --model-digest D] [--pictures]

Two servers of the same model run on loopback: one as deployed, one with `--batch-images 1`. Rounds alternate between
them, so that both see the same machine; the figures are over all rounds. It ends after rounds x levels x 2 x seconds.
A request is a tensor in binary form; with `--pictures`, a form with one 32x32 JPEG.
"""

import argparse
import contextlib
import io
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from resources.object_store import FolderStore
from tests.unit.serving.server_process import ServerProcess, ask_on, form, run_server
from tests.unit.serving.tiny_model import store_tiny_model

if TYPE_CHECKING:
    from cifar_assets.training.networks import PublishedNetwork

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
Request = tuple[str, bytes, dict[str, str]]
"""Path, body and headers of a POST."""


def untrained_network(recipe: str) -> "PublishedNetwork":
    """The recipe's network with about the weights it starts from: as costly to run as a trained one.

    Noise makes them different: the exporter merges equal ones, which the int8 model would convert in every run.
    """
    import torch

    from cifar_assets.contracts import CIFAR10
    from cifar_assets.training.networks import PublishedNetwork, build_network
    from cifar_assets.training.recipes import get_recipe

    torch.manual_seed(0)
    network = build_network(get_recipe(recipe), CIFAR10)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.001 * torch.randn_like(parameter))
    return PublishedNetwork(network, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def untrained_onnx(recipe: str) -> bytes:
    from cifar_assets.contracts import CIFAR10
    from cifar_assets.training.package import onnx_bytes

    return onnx_bytes(untrained_network(recipe), CIFAR10.image_size)


def picture(side: int) -> bytes:
    """A JPEG of a smooth picture."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((side, side)).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()


def picture_request() -> bytes:
    """A whole HTTP request: a form with one 32x32 JPEG."""
    body, content_type = form(("image", picture(32)), content_type="image/jpeg")
    lines = ["POST /v1/models/cifar10:predict HTTP/1.1", "Host: x", f"Content-Type: {content_type}"]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Options that say which model is served."""
    parser.add_argument("--model-uri")
    parser.add_argument("--model-digest")
    parser.add_argument("--recipe", help="network to run with untrained weights; by default a tiny linear model")


def model_to_serve(options: argparse.Namespace, store: FolderStore) -> tuple[str, str]:
    """URI and digest of the model that the options name, stored first where it is untrained."""
    if options.model_uri is not None:
        return options.model_uri, options.model_digest
    return store_tiny_model(store, onnx_bytes=untrained_onnx(options.recipe) if options.recipe else None)


def measure(server: ServerProcess, num_clients: int, seconds: float, request: Request) -> list[float]:
    """Latencies, in seconds, of all answers that clients in a closed loop got within the time."""
    latencies: list[float] = []
    deadline = time.perf_counter() + seconds

    def work() -> None:
        own: list[float] = []
        with contextlib.closing(server.connect()) as connection:
            while (started := time.perf_counter()) < deadline:
                answer = ask_on(connection, "POST", *request)
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
    add_model_options(parser)
    parser.set_defaults(recipe="baseline")
    parser.add_argument("--pictures", action="store_true", help="ask with forms of one JPEG each")
    parser.add_argument("--rounds", type=int, default=5, choices=range(1, 51))
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    body, content_type = form(("image", picture(32)))
    request: Request = ("/v2/models/cifar10/infer", HEADER + PIXELS, HEADERS)
    if options.pictures:
        request = ("/v1/models/cifar10:predict", body, {"Content-Type": content_type})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        uri, digest = model_to_serve(options, FolderStore(folder / "models"))
        print(f"{os.cpu_count()} cores, {options.rounds} rounds of {options.seconds:g} s, one image per request")
        print(f"{'clients':>7} {'server':>8} {'p50 ms':>8} {'p99 ms':>8} {'req/s':>8} {'n':>7}")
        with two_servers(uri, digest, folder) as servers:
            for num_clients in LEVELS:
                compare(servers, num_clients, options.rounds, min(options.seconds, 30), request)


def compare(servers: dict[str, ServerProcess], num_clients: int, rounds: int, seconds: float, request: Request) -> None:
    """Print one level of load: each server's figures, and the ratio of batched to single."""
    latencies: dict[str, list[float]] = {name: [] for name in servers}
    for server in servers.values():
        measure(server, num_clients, min(0.5, seconds), request)
    for index in range(rounds):
        order = list(servers) if index % 2 == 0 else list(reversed(servers))
        for name in order:
            latencies[name] += measure(servers[name], num_clients, seconds, request)
    figures = {}
    for name, values in latencies.items():
        p50, p99 = np.percentile(values, [50, 99]) * 1000
        figures[name] = (p50, p99, len(values) / (rounds * seconds))
        print(f"{num_clients:>7} {name:>8} {p50:>8.2f} {p99:>8.2f} {figures[name][2]:>8.0f} {len(values):>7}")
    ratios = [batched / single for batched, single in zip(figures["batched"], figures["single"], strict=True)]
    print(f"{num_clients:>7} {'ratio':>8} {ratios[0]:>8.2f} {ratios[1]:>8.2f} {ratios[2]:>8.2f}", flush=True)


if __name__ == "__main__":
    main()
