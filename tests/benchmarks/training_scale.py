"""How a training scales: two processes of one core beside one process of two, and memory with the number of images.

    python tests/benchmarks/training_scale.py [--parts processes memory] [--recipes fast resnet18] [--rounds 3]

`processes` trains the same short job both ways in turns and compares images/s (aim: 0.85). `memory` trains a small
network on 60,000 and on 600,000 distinct images that are mapped, not resident, then on the latter again with less
memory than the images take (aim: flat, and finishes). The limit is a memory cgroup, which includes cached pages of the
mapped files, or without the right to make one, RLIMIT_DATA, which does not.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cifar_assets.contracts import CIFAR10, CLASSES
from cifar_assets.dataset.index import pixel_digests
from cifar_assets.dataset.sources.synthetic import draw_split
from cifar_assets.dataset.versions.processed import MANIFEST_FILE, ProcessedManifest
from cifar_assets.dataset.versions.shards import Shard, ShardWriter
from cifar_assets.dataset.versions.splits import SplitConfig, SplitName
from cifar_assets.training.device import choose_processor, describe_environment
from cifar_assets.training.recipes import get_recipe
from cifar_assets.training.spec import Execution, JobSpec
from resources.object_store import FolderStore
from tests.unit.training.jobs import COMMAND
from tests.unit.training.small_dataset import RAW_DIGEST, store_dataset

NUM_IMAGES = 12_288
DRAWN = 5_000
SMALL_NETWORK = {"width": 8, "widening": 1, "epochs": 1, "resolutions": [{"start": 0, "size": 16}]}
LIMIT_MEGABYTES = 1024
_CGROUPS = (("/sys/fs/cgroup", "memory.max"), ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"))


def job(folder: Path, digest: str, recipe: str, overrides: dict[str, Any], resident_megabytes: int = 4096) -> JobSpec:
    """A job of one epoch on the dataset below the folder."""
    return JobSpec(
        dataset_uri=FolderStore(folder).uri(f"{digest}/"),
        dataset_digest=digest,
        recipe=get_recipe(recipe, {"epochs": 1, **overrides}),
        output_uri=FolderStore(folder / "models").uri(),
        execution=Execution(checkpoint_every_steps=0, resident_megabytes=resident_megabytes),
    )


def run(spec: JobSpec, command: Sequence[str]) -> tuple[float, int, int]:
    """Images/s of a job in processes of its own, and the peak of its memory in MB: all, and without mapped files."""
    models = Path(tempfile.mkdtemp(dir=spec.output_uri.removeprefix("file://").rstrip("/").removesuffix("/models")))
    spec = spec.model_copy(
        update={"output_uri": FolderStore(models).uri()}
    )  # an equal model would not be written again
    process = subprocess.Popen(
        command, env={**os.environ, "CIFAR_JOB_SPEC": spec.model_dump_json()}, stdout=subprocess.PIPE, text=True
    )
    most = anonymous = 0
    while process.poll() is None:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        status = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("VmHWM", "RssAnon"))}
        most, anonymous = max(most, status.get("VmHWM", 0)), max(anonymous, status.get("RssAnon", 0))
        time.sleep(0.1)
    assert process.stdout
    output = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"The training ended with {process.returncode}: {output[-2000:]}")
    (performance,) = models.glob("*/performance.json")
    return json.loads(performance.read_text())["images_per_second"], most // 1024, anonymous // 1024


def processes(recipes: Sequence[str], rounds: int) -> None:
    """Prints images/s of both ways, and their ratio."""
    two = [sys.executable, "-m", "cifar_assets.training.launch", "--standalone", "--nproc-per-node=2"]
    ways = {"1 process of 2 cores": COMMAND, "2 processes of 1 core": two}
    with tempfile.TemporaryDirectory() as name:
        digest = store_dataset(Path(name), train=NUM_IMAGES)
        for recipe in recipes:
            spec = job(Path(name), digest, recipe, {})
            rates: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(rounds):
                for way, command in ways.items():
                    rates[way].append(run(spec, command)[0])
            one, both = rates.values()
            ratios = [b / a for a, b in zip(one, both, strict=True)]
            for way, values in rates.items():
                print(f"{recipe}, {way}: {statistics.median(values):.0f} images/s")
            print(f"{recipe}: ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})")


def store_distinct(folder: Path, count: int) -> str:
    """Write a processed dataset with that many distinct images for training; gives its digest."""
    folder.mkdir()
    store = FolderStore(folder)
    images, labels = draw_split(0, "train", DRAWN)
    numbers: dict[SplitName, int] = {"train": count, "validation": DRAWN, "test": DRAWN}
    shards: dict[SplitName, tuple[Shard, ...]] = {}
    counts: dict[SplitName, dict[str, int]] = {}
    for split, number in numbers.items():
        writer = ShardWriter(store, folder, SplitConfig().max_shard_rows, CIFAR10)
        for copy in range(number // DRAWN):
            copied, rows = images ^ np.uint8(copy), np.arange(DRAWN, dtype=np.int64)
            tensors = {"images": copied, "labels": labels, "digests": pixel_digests(copied), "rows": rows}
            writer.add({**tensors, "objects": np.zeros(DRAWN, np.int32)})
        shards[split] = tuple(shard.model_copy(update={"objects": (0,)}) for shard in writer.finish())
        counts[split] = dict(zip(CLASSES, writer.label_counts.tolist(), strict=True))
    manifest = ProcessedManifest(
        raw_digest=RAW_DIGEST,
        config=SplitConfig(),
        counts=counts,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        shards=shards,
    )
    manifest.write(store, f"{manifest.digest}/{MANIFEST_FILE}")
    return manifest.digest


@contextmanager
def memory_limit(megabytes: int) -> Iterator[tuple[str, list[str]]]:
    """The kind of limit, and the prefix of a command that runs under it."""
    for parent, setting in _CGROUPS:
        group = Path(parent, f"training-scale-{os.getpid()}")
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            if not (group / setting).exists():
                continue
            (group / setting).write_text(str(megabytes << 20))
            yield setting, ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
            return
        finally:
            group.rmdir()
    yield "RLIMIT_DATA", ["prlimit", f"--data={megabytes << 20}", "--"]


def memory(sizes: Sequence[int]) -> None:
    """Prints speed and peak memory by number of images, without a limit and with one."""
    print("| images | MB of images | limit | images/s | peak MB | without mapped files |\n|---|---|---|---|---|---|")
    with memory_limit(LIMIT_MEGABYTES) as (kind, limited), tempfile.TemporaryDirectory() as name:
        for size in sizes:
            folder = Path(name, str(size))
            spec = job(folder, store_distinct(folder, size), "quick", SMALL_NETWORK, resident_megabytes=64)
            limits = {"none": [], f"{LIMIT_MEGABYTES} MB ({kind})": limited} if size == max(sizes) else {"none": []}
            for limit, prefix in limits.items():
                rate, most, anonymous = run(spec, [*prefix, *COMMAND])
                print(f"| {size:,} | {size * 3072 >> 20} | {limit} | {rate:.0f} | {most} | {anonymous} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["processes", "memory"], choices=["processes", "memory"])
    parser.add_argument("--recipes", nargs="+", default=["fast", "resnet18"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[60_000, 600_000])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(describe_environment(choose_processor(Execution(), "auto"), 1))
    if "processes" in options.parts:
        processes(options.recipes, options.rounds)
    if "memory" in options.parts:
        memory(options.sizes)


if __name__ == "__main__":
    main()
