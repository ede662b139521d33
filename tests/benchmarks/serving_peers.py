"""Our server beside others that serve the same model, in one run on one machine.

    python tests/benchmarks/serving_peers.py [--recipe NAME] [--peers NAME ...]

Each peer (tests/benchmarks/peers) runs in an environment of its own, made by uv, as its documentation starts it, with
one worker process and with batching where it has that. A request holds one 32x32 JPEG: a multipart form, V1 JSON for
kserve, the bare picture for mosec. All servers stay up, and rounds go through them in turn. One client process with a
raw socket for each connection asks in a closed loop. All must agree on the probabilities, int8 within 0.01. Memory is
that of all processes of a server. Needs uv and a package index; ends after rounds x levels x peers x seconds.
"""

import argparse
import base64
import contextlib
import io
import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from resources.digests import sha256_bytes
from resources.object_store import FolderStore
from tests.benchmarks.serving_latency import untrained_network
from tests.unit.serving.server_process import form
from tests.unit.serving.tiny_model import store_tiny_model

LEVELS = (1, 8, 32)
OURS = {"ours": "float32", "ours_int8": "int8"}
FOLDER = Path(__file__).parent / "peers"
ONNX = [f"onnxruntime=={version('onnxruntime')}", "numpy", "pillow"]
TORCH = [f"torch=={version('torch')}", "pydantic", "numpy", "pillow"]
PEERS = {
    "ours": [],
    "ours_int8": [],
    "flask_torch": ["flask==3.1.3", *TORCH],
    "kserve_torch": [f"kserve=={version('kserve')}", *TORCH],
    "fastapi_onnx": ["fastapi==0.121.3", "uvicorn[standard]==0.38.0", "python-multipart", *ONNX],
    "litserve_onnx": ["litserve==0.2.19", "python-multipart", *ONNX],
    "bentoml_onnx": ["bentoml==1.4.40", *ONNX],
    "mosec_onnx": ["mosec==0.9.8", *ONNX],
}


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def request_of(peer: str) -> bytes:
    """A whole HTTP request, for one picture."""
    picture = jpeg()
    path, (body, content_type) = "/predict", form(("image", picture), content_type="image/jpeg")
    if peer in OURS:
        path = "/v1/models/cifar10:predict"
    elif peer == "kserve_torch":
        path, content_type = "/v1/models/cifar10:predict", "application/json"
        body = json.dumps({"instances": [{"b64": base64.b64encode(picture).decode()}]}).encode()
    elif peer == "mosec_onnx":
        path, body, content_type = "/inference", picture, "image/jpeg"
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: x",
        f"Content-Type: {content_type}",
        f"Content-Length: {len(body)}",
        "",
        "",
    ]
    return "\r\n".join(lines).encode() + body


class Connection:
    """Asks the same thing again as soon as it is answered, on one connection if the server keeps it open."""

    def __init__(self, port: int, request: bytes):
        self.port = port
        self.request = request
        self.connect()

    def connect(self) -> None:
        self.socket = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self) -> None:
        self.received = b""
        self.asked = time.perf_counter()
        self.socket.sendall(self.request)

    def read(self) -> bytes | None:
        """The body, once it is whole."""
        data = self.socket.recv(65536)
        if not data:
            raise ConnectionError("The server closed the connection in mid-answer.")
        self.received += data
        head, _, body = self.received.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if not length or len(body) < int(length):
            return None
        if not head.startswith((b"HTTP/1.1 200", b"HTTP/1.0 200")):
            raise SystemExit(f"A server answered {self.received[:300]!r}")
        self.is_closed = b"connection: close" in head.lower()
        return body


def ask_once(port: int, request: bytes) -> bytes:
    connection = Connection(port, request)
    with connection.socket:
        connection.ask()
        while (body := connection.read()) is None:
            pass
    return body


def measure(port: int, request: bytes, num_connections: int, seconds: float) -> list[float]:
    """Latencies, in seconds, of all answers that came within the time."""
    latencies: list[float] = []
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        for _ in range(num_connections):
            connection = Connection(port, request)
            stack.enter_context(connection.socket)
            selector.register(connection.socket, selectors.EVENT_READ, connection)
            connection.ask()
        deadline = time.perf_counter() + seconds
        while (now := time.perf_counter()) < deadline:
            for key, _ in selector.select(deadline - now):
                connection = key.data
                if connection.read() is None:
                    continue
                latencies.append(time.perf_counter() - connection.asked)
                if connection.is_closed:
                    selector.unregister(connection.socket)
                    connection.socket.close()
                    connection.connect()
                    stack.enter_context(connection.socket)
                    selector.register(connection.socket, selectors.EVENT_READ, connection)
                connection.ask()
    return latencies


@dataclass
class Server:
    """A peer's processes and what was measured of it."""

    name: str
    process: psutil.Process
    port: int
    ready_seconds: float
    latencies: dict[int, list[float]] = field(default_factory=lambda: {level: [] for level in LEVELS})
    cpu_seconds: float = 0.0
    """At the highest level."""

    def cpu(self) -> float:
        times = [process.cpu_times() for process in self._processes()]
        return sum(each.user + each.system for each in times)

    def megabytes(self) -> float:
        return sum(process.memory_full_info().pss for process in self._processes()) / 2**20

    def _processes(self) -> list[psutil.Process]:
        return [self.process, *self.process.children(recursive=True)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def command_of(peer: str, port: int, uri: str, digest: str) -> list[str]:
    if peer in OURS:
        named = ["--model-uri", uri, "--model-digest", digest, "--port", str(port), "--precision", OURS[peer]]
        return [sys.executable, "-m", "cifar_assets.serving", *named, "--threads", str(os.cpu_count() or 1)]
    if peer == "bentoml_onnx":
        return [python_of(peer), "-m", "bentoml", "serve", "bentoml_onnx:Classifier", "--port", str(port)]
    return [python_of(peer), f"{peer}.py"]


def python_of(peer: str) -> str:
    """The interpreter of an environment with the peer's requirements, made where it is missing."""
    folder = Path(".cifar/peers", sha256_bytes(" ".join(PEERS[peer]).encode())[:12]).absolute()
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run(["uv", "venv", "--quiet", f"--python={sys.executable}", folder], check=True)
        subprocess.run(["uv", "pip", "install", "--quiet", f"--python={python}", *PEERS[peer]], check=True)
    return str(python)


@contextlib.contextmanager
def running(peer: str, models: Path, uri: str, digest: str) -> Iterator[Server]:
    """A server that answers. Its time to ready is that of a second start, with compiled files in place."""
    for attempt in ("first", "measured"):
        port = free_port()
        command = command_of(peer, port, uri, digest)
        environment = {**os.environ, "MODEL": str(models), "PORT": str(port), "PYTHONPATH": os.getcwd()}
        with (models / f"{peer}.log").open("wb") as log:
            started = time.perf_counter()
            where = Path.cwd() if peer in OURS else FOLDER
            process = subprocess.Popen(
                command, cwd=where, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        try:
            wait_until_ready(process, port, peer, models)
            if attempt == "measured":
                yield Server(peer, psutil.Process(process.pid), port, time.perf_counter() - started)
        finally:
            for each in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.terminate()
            process.wait(30)


def wait_until_ready(process: "subprocess.Popen[bytes]", port: int, peer: str, models: Path) -> None:
    """Returns after the first right answer."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            body = ask_once(port, request_of(peer))
        except (OSError, SystemExit):
            time.sleep(0.02)
            continue
        check(peer, json.loads(body), models)
        return
    raise SystemExit(f"{peer} did not become ready:\n{(models / f'{peer}.log').read_text()[-3000:]}")


def check(peer: str, answer: object, models: Path) -> None:
    """Compare the probabilities with the first server's."""
    row = answer["predictions"][0] if isinstance(answer, dict) else answer
    found = np.array(list(row["probabilities"].values()) if isinstance(row, dict) else row).ravel()
    expected = models / "expected.npy"
    if not expected.exists():
        np.save(expected, found)
    if not np.allclose(found, np.load(expected), atol=1e-2 if peer == "ours_int8" else 1e-3):
        raise SystemExit(f"{peer} answers {found}, not {np.load(expected)}.")


def store_model(recipe: str, folder: Path) -> tuple[str, str]:
    """The recipe's network with untrained weights, as ONNX, as torch module, and as a package of ours."""
    import torch

    from cifar_assets.training.package import onnx_bytes
    from cifar_assets.training.quantize import int8_bytes

    network = untrained_network(recipe).eval()
    model = onnx_bytes(network, 32)
    images = np.random.default_rng(0).integers(0, 256, (64, 3, 32, 32), dtype=np.uint8)
    (folder / "model.onnx").write_bytes(model)
    torch.save(network, folder / "model.pt")
    int8 = int8_bytes(model, images, os.cpu_count() or 1)
    return store_tiny_model(FolderStore(folder / "models"), onnx_bytes=model, int8=int8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=5, choices=range(1, 51))
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        models = Path(name)
        uri, digest = store_model(options.recipe, models)
        servers = [stack.enter_context(running(peer, models, uri, digest)) for peer in options.peers]
        for level in LEVELS:
            for server in servers:
                measure(server.port, request_of(server.name), level, min(options.seconds, 1.0))
            for index in range(options.rounds):
                for server in servers if index % 2 == 0 else reversed(servers):
                    before = server.cpu()
                    server.latencies[level] += measure(
                        server.port, request_of(server.name), level, min(options.seconds, 30)
                    )
                    if level == LEVELS[-1]:
                        server.cpu_seconds += server.cpu() - before
        show(servers, options.rounds * min(options.seconds, 30))


def show(servers: list[Server], seconds: float) -> None:
    print(f"{os.cpu_count()} cores, {seconds:g} s for each figure; CPU at {LEVELS[-1]} connections")
    rates = " ".join(f"{f'req/s {level}':>9} {f'p99 ms {level}':>9}" for level in LEVELS)
    print(f"{'server':>14} {rates} {'CPU ms':>7} {'MB':>6} {'ready s':>8}")
    for server in servers:
        figures = []
        for level in LEVELS:
            values = server.latencies[level]
            p99 = f"{1000 * np.percentile(values, 99):.1f}" if values else "-"
            figures.append(f"{len(values) / seconds:>9.0f} {p99:>9}")
        cpu = 1000 * server.cpu_seconds / max(1, len(server.latencies[LEVELS[-1]]))
        figures.append(f"{cpu:>7.2f} {server.megabytes():>6.0f} {server.ready_seconds:>8.2f}")
        print(f"{server.name:>14} {' '.join(figures)}", flush=True)


if __name__ == "__main__":
    main()
