"""What this project's orchestration costs beside the training.

    python tests/benchmarks/orchestration.py --source FOLDER [--parts graph definitions sensor] [--rounds 5]

`graph` materializes all assets with one short epoch and subtracts the trainer's own phases (aim: 20 s for 60,000
images). `definitions` loads this code location and an empty one in turns, each in a new process (aim: at most 1.5 times
as long). `sensor` is a tick over 10,000 landed objects, in MinIO if its binary is on PATH, else in a folder (aim: 2 s).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import dagster as dg

from cifar_assets.contracts import CLASSES, LANDING_PREFIX
from cifar_assets.dataset.formats.rows import Preparation
from cifar_assets.dataset.landing.zone import LandingRecord, Seen, fingerprint, scan_landing
from cifar_assets.demo import FOUR_ASSETS
from resources.object_store.resource import LocalObjectStore, MinioObjectStore, ObjectStoreResource
from tests.fixtures.cifar10 import landing_sensor
from tests.fixtures.ports import free_port
from tests.fixtures.s3 import find_minio, running_minio
from tests.fixtures.workspace import ROOT, Workspace

NUM_OBJECTS = 10_000
COMPILED = {"PYTHONDONTWRITEBYTECODE": ""}
"""Unset, as on a laptop: otherwise every process would compile the checkout's modules again, but no installed ones."""


def graph(source: str) -> None:
    """One run of all assets and checks, with the seconds of each step."""
    training = {"recipe": "quick", "overrides": {"epochs": 1, "width": 16}}
    with tempfile.TemporaryDirectory() as name:
        shutil.copy(ROOT / "dagster.yaml", name)
        settings = {"ACCURACY_THRESHOLD": "0", "INFERENCE_SERVICE_PORT": str(free_port()), "CIFAR10_SOURCE": source}
        workspace = Workspace(Path(name), {"PYTHONPATH": str(ROOT), **COMPILED, **settings})
        started = time.time()
        done = workspace.materialize(FOUR_ASSETS, {"trained_model": training})
        ended = time.time()
        workspace.python("-m", "resources.inference_service.local", "stop")
        if done.returncode:
            raise SystemExit(done.stdout)
        (performance,) = Path(name).glob(".cifar/store/models/*/performance.json")
        trainer = sum(json.loads(performance.read_text())["seconds_per_phase"].values())
        kinds = {dg.DagsterEventType.STEP_START, dg.DagsterEventType.STEP_SUCCESS}
        with workspace.instance() as instance:
            events = instance.all_logs(instance.get_runs(limit=1)[0].run_id, of_type=kinds)
    times: dict[str, list[float]] = {}
    for entry in events:
        times.setdefault(str(entry.step_key), []).append(entry.timestamp)
    rows = {"before the first step": min(map(min, times.values())) - started}
    rows |= {step: max(each) - min(each) for step, each in times.items()}
    rows |= {"after the last step": ended - max(map(max, times.values())), "in all": ended - started}
    rows |= {"the trainer's own phases": trainer, "in all without them": ended - started - trainer}
    for name, seconds in rows.items():
        print(f"{name:>40} {seconds:6.1f} s")


def definitions(rounds: int) -> None:
    """Loads both code locations in turns."""
    loads = ("import dagster as dg; defs = dg.Definitions()", "from cifar_assets.definitions import defs")
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        for load, values in zip(loads, seconds, strict=True):
            started = time.perf_counter()
            subprocess.run(
                [sys.executable, "-c", f"{load}; defs.get_repository_def()"], env={**os.environ, **COMPILED}, check=True
            )
            values.append(time.perf_counter() - started)
    empty, ours = (values[1:] for values in seconds)  # the first load may compile modules
    ratios = [a / b for a, b in zip(ours, empty, strict=True)]
    print(f"empty {statistics.median(empty):.2f} s, ours {statistics.median(ours):.2f} s, ", end="")
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})")


@contextmanager
def landed_objects(folder: Path) -> Iterator[tuple[str, ObjectStoreResource]]:
    """A store with that many settled objects in its landing zone."""
    keys = [f"{LANDING_PREFIX}{CLASSES[number % len(CLASSES)]}/{number:05d}.png" for number in range(NUM_OBJECTS)]

    def fill(store: ObjectStoreResource) -> None:
        store.ensure_buckets()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: store.raw.write(key, b"x"), keys))

    if find_minio() is None:
        store = LocalObjectStore(path=str(folder / "store"))
        fill(store)
        for key in keys:
            path = store.raw.local_path(key)
            assert path is not None
            os.utime(path, (0, 0))
        yield "folder", store
        return
    with running_minio(folder) as server:
        store = MinioObjectStore(
            endpoint_url=server.endpoint, access_key=server.access_key, secret_key=server.secret_key
        )
        fill(store)
        yield "MinIO", store


def sensor(rounds: int) -> None:
    """Ticks over new objects, and over objects that a build has read."""
    with tempfile.TemporaryDirectory() as name, landed_objects(Path(name)) as (kind, store):
        instance = dg.DagsterInstance.ephemeral()

        def tick(cursor: str | None) -> tuple[float, dg.SensorResult]:
            context = dg.build_sensor_context(instance=instance, cursor=cursor, resources={"object_store": store})
            started = time.perf_counter()
            result = landing_sensor(context)
            assert isinstance(result, dg.SensorResult)
            return time.perf_counter() - started, result

        ticks = [tick(None) for _ in range(rounds)]
        cursor = ticks[-1][1].cursor
        assert ticks[-1][1].run_requests
        infos = scan_landing(store.raw).ready
        seen = {fingerprint(info): Seen(sha256="0" * 64, pixels="0" * 64) for info in infos}
        how = Preparation(classes=CLASSES, resize=True)
        LandingRecord(read=frozenset(seen), preparation=how.key, seen=seen).save(store.raw)
        again = [tick(cursor) for _ in range(rounds)]
        assert not any(result.run_requests for _, result in again)
    for what, made in (("all new", ticks), ("all known", again)):
        print(f"{NUM_OBJECTS:,} objects in {kind}, {what}: {statistics.median(seconds for seconds, _ in made):.2f} s")


def main() -> None:
    parts = ["graph", "definitions", "sensor"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default=os.environ.get("CIFAR10_SOURCE") or "synthetic", help="as CIFAR10_SOURCE")
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    runs = {
        "graph": lambda: graph(options.source),
        "definitions": lambda: definitions(options.rounds),
        "sensor": lambda: sensor(options.rounds),
    }
    for part in options.parts:
        print(f"\n{part}", flush=True)
        runs[part]()


if __name__ == "__main__":
    main()
