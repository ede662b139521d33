"""What the server does when more is asked of it than it can take.

    python tests/benchmarks/serving_overload.py [--recipe NAME | --model-uri URI --model-digest D]

One process serves, others ask: first in a closed loop of 32 clients, which gives the rate the server can take, then at
half of that rate, the whole, twice and four times, whether answers come or not. Each row has the answers a second, the
refusals, and the latencies of answers, refusals and health. Aims: at twice the rate the throughput stays within 10 %,
refusals take less than 10 ms, health less than 50 ms. Clients and server share the machine: leave the clients a core.
"""

import argparse
import asyncio
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from resources.object_store import FolderStore
from tests.benchmarks.serving_latency import add_model_options, model_to_serve, picture_request
from tests.unit.serving.server_process import run_server

HEALTH = b"GET /v2/health/ready HTTP/1.1\r\nHost: x\r\n\r\n"
NUM_CONNECTIONS = 300


@dataclass
class Tally:
    """Latencies in seconds by outcome."""

    answers: list[float] = field(default_factory=list)
    refusals: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)
    num_left_out: int = 0
    """Requests that no connection was free for."""


async def ask(connection: tuple[asyncio.StreamReader, asyncio.StreamWriter], request: bytes) -> int:
    """Send one request on an open connection; gives the status."""
    reader, writer = connection
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
    await reader.readexactly(int(length))
    return int(head[9:12])


async def measure(port: int, request: bytes, seconds: float, rate: float | None) -> Tally:
    """Ask in a closed loop of 32 clients, or at a rate."""
    tally = Tally()
    connections = [
        await asyncio.open_connection("127.0.0.1", port) for _ in range(32 if rate is None else NUM_CONNECTIONS)
    ]
    probe = await asyncio.open_connection("127.0.0.1", port)
    deadline = time.perf_counter() + seconds

    async def one(connection: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        started = time.perf_counter()
        status = await ask(connection, request)
        if status not in (200, 429):
            raise SystemExit(f"The server answered {status}.")
        (tally.answers if status == 200 else tally.refusals).append(time.perf_counter() - started)

    async def closed_loop(connection: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        while time.perf_counter() < deadline:
            await one(connection)

    async def open_loop(rate: float) -> None:
        free, tasks = list(connections), set()
        due = time.perf_counter()
        while (now := time.perf_counter()) < deadline:
            while due <= now:
                due += 1 / rate
                if not free:
                    tally.num_left_out += 1
                    continue
                connection = free.pop()
                task = asyncio.create_task(one(connection))
                task.add_done_callback(lambda _, connection=connection: free.append(connection))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.sleep(0.001)
        await asyncio.gather(*tasks)

    async def probe_health() -> None:
        while time.perf_counter() < deadline:
            started = time.perf_counter()
            await ask(probe, HEALTH)
            tally.health.append(time.perf_counter() - started)
            await asyncio.sleep(0.05)

    load = [closed_loop(connection) for connection in connections] if rate is None else [open_loop(rate)]
    await asyncio.gather(*load, probe_health())
    for _, writer in [*connections, probe]:
        writer.close()
    return tally


def show(name: str, tally: Tally, seconds: float) -> float:
    """Print one row, and give the answers a second."""
    figures = [name, f"{len(tally.answers) / seconds:.0f}", f"{len(tally.refusals) / seconds:.0f}"]
    for values in (tally.answers, tally.refusals, tally.health):
        figures.append("/".join(f"{1000 * np.percentile(values, p):.1f}" for p in (50, 99)) if values else "-")
    print(
        f"{figures[0]:>10} {figures[1]:>10} {figures[2]:>11} {figures[3]:>16} {figures[4]:>16} {figures[5]:>16}",
        flush=True,
    )
    return len(tally.answers) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    request = picture_request()
    with tempfile.TemporaryDirectory() as name:
        uri, digest = model_to_serve(options, FolderStore(Path(name) / "models"))
        with run_server(uri, digest, Path(name)) as server:
            print("      load  answers/s  refusals/s  answers p50/p99 refusals p50/p99   health p50/p99   (ms)")
            asyncio.run(measure(server.port, request, 1.0, None))
            full = show(
                "32 clients", asyncio.run(measure(server.port, request, options.seconds, None)), options.seconds
            )
            for factor in (0.5, 1.0, 2.0, 4.0):
                tally = asyncio.run(measure(server.port, request, options.seconds, factor * full))
                show(f"{factor:g} x", tally, options.seconds)


if __name__ == "__main__":
    main()
