"""What recording costs the server: off, 10 % and 100 % of the answers, side by side.

    python tests/benchmarks/serving_record.py [--recipe NAME | --model-uri URI --model-digest D] [--rounds N]

Three servers of the same model run on loopback and record to a folder, without the hourly limit. Rounds alternate
between them, so that all see the same machine; `ratio` is the median, over the rounds, of the requests in a round
divided by those of the server that does not record. A request is one image in binary form, from 8 clients in a closed
loop.
"""

import argparse
import contextlib
import os
import re
import tempfile
from pathlib import Path

import numpy as np

from resources.object_store import FolderStore
from tests.benchmarks.serving_latency import HEADER, HEADERS, PIXELS, add_model_options, measure, model_to_serve
from tests.unit.serving.server_process import ServerProcess, run_server

REQUEST = ("/v2/models/cifar10/infer", HEADER + PIXELS, HEADERS)
NUM_CLIENTS = 8
FRACTIONS = {"off": "0", "10 %": "0.1", "100 %": "1"}


def memory(server: ServerProcess) -> float:
    """Resident memory in MiB."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+) kB", status)[0]) / 1024


def cpu_seconds(server: ServerProcess) -> float:
    fields = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def outcomes(server: ServerProcess) -> dict[str, float]:
    found = re.findall(r'cifar10_recorded_images_total\{outcome="(\w+)"\} (\S+)', server.get("/metrics").body.decode())
    return {name: float(value) for name, value in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    parser.set_defaults(recipe="baseline")
    parser.add_argument("--rounds", type=int, default=36)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        uri, digest = model_to_serve(options, FolderStore(folder / "models"))
        record = ("--record-per-hour", "1000000000", "--record-interval", "5")
        servers = {}
        for label, fraction in FRACTIONS.items():
            (folder / label).mkdir()
            own = ("--record-uri", (folder / label / "traffic").as_uri(), "--record-fraction", fraction, *record)
            servers[label] = stack.enter_context(run_server(uri, digest, folder / label, *own))
            measure(servers[label], NUM_CLIENTS, 1, REQUEST)
        latencies: dict[str, list[list[float]]] = {label: [] for label in servers}
        started = {label: cpu_seconds(server) for label, server in servers.items()}
        for index in range(options.rounds):
            for label in list(servers) if index % 2 == 0 else list(reversed(servers)):
                latencies[label].append(measure(servers[label], NUM_CLIENTS, options.seconds, REQUEST))
        print(f"{os.cpu_count()} cores, {NUM_CLIENTS} clients, {options.rounds} rounds of {options.seconds:g} s")
        names = "".join(f"{name:>9}" for name in ("p50 ms", "p99 ms", "req/s", "ratio", "CPU ms", "MiB", "n"))
        print(f"{'record':>7}{names}")
        for label, rounds in latencies.items():
            values = np.concatenate(rounds)
            p50, p99 = np.percentile(values, [50, 99]) * 1000
            rate = len(values) / (options.rounds * options.seconds)
            ratio = np.median([len(own) / len(off) for own, off in zip(rounds, latencies["off"], strict=True)])
            cpu = (cpu_seconds(servers[label]) - started[label]) / len(values) * 1000
            figures = (p50, p99, rate, ratio, cpu, memory(servers[label]), len(values))
            print(f"{label:>7}{''.join(f'{figure:>9.3f}' for figure in figures)} {outcomes(servers[label])}")


if __name__ == "__main__":
    main()
