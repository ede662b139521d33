"""Time and memory of importing and processing images: the real ones, and up to ten times as many distinct ones.

    python tests/benchmarks/data_ingest.py --source FOLDER [--parts real growth] [--sizes 1 3 10] [--rounds 1]

`real` reads the source as it is. `growth` multiplies it: copy k holds every image with k added to each byte by xor, as
PNG in Parquet, so that all of them are distinct. Every build runs in a new process and a new store. Memory is the peak
of that process and of the one that reads untrusted files. The aims: 15 s for 60,000 real images; linear time and flat
memory for the rest.
"""

import argparse
import io
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cifar_assets.cpus import available_cpus
from cifar_assets.dataset.versions.processed import build_processed
from cifar_assets.dataset.versions.raw import build_raw_version
from cifar_assets.dataset.versions.reader import open_split
from cifar_assets.dataset.versions.splits import SPLIT_NAMES, SplitName
from resources.object_store import FolderStore

_FRESH = multiprocessing.get_context("spawn")


class Built(NamedTuple):
    """One build: seconds to import and to process, and peak memory in MB of the builder and of its reader."""

    images: int
    imported: float
    processed: float
    builder: int
    reader: int

    @property
    def seconds(self) -> float:
        return self.imported + self.processed


def build(source: str, folder: str) -> tuple[Built, str]:
    """Import and process a source into a store at the folder. Also gives the processed digest."""
    raw, processed = FolderStore(Path(folder, "raw")), FolderStore(Path(folder, "processed"))
    started = time.perf_counter()
    version = build_raw_version(raw, source)
    imported = time.perf_counter()
    digest = build_processed(raw, processed, version.digest).digest
    ended = time.perf_counter()
    readers = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    reader = max((peak_megabytes(pid) for pid in readers), default=0)
    return Built(version.manifest.rows, imported - started, ended - imported, peak_megabytes("self"), reader), digest


def peak_megabytes(pid: str) -> int:
    """Most memory that a process had; it includes what it mapped."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) // 1024


def in_new_process(source: Path | str, folder: str) -> tuple[Built, str]:
    """`build` in a process that did nothing before."""
    with ProcessPoolExecutor(1, _FRESH) as pool:
        return pool.submit(build, str(source), folder).result()


def write_copy(path: Path, folder: str, digest: str, split: SplitName, number: int) -> None:
    """A copy of one split as Parquet in the Hugging Face layout. Copies with different numbers share no image."""
    reader = open_split(FolderStore(Path(folder, "processed")), digest, split)
    rows = []
    for image in (reader.images ^ np.uint8(number)).transpose(0, 2, 3, 1):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG", compress_level=1)
        rows.append({"bytes": buffer.getvalue(), "path": ""})
    pq.write_table(pa.table({"img": rows, "label": reader.labels}), path)


def write_copies(source: str, folder: Path, count: int) -> list[list[Path]]:
    """The files of each copy, named as a source needs them."""
    copies: list[list[Path]] = []
    with tempfile.TemporaryDirectory() as store, ProcessPoolExecutor(int(available_cpus()), _FRESH) as pool:
        _, digest = in_new_process(source, store)
        jobs = []
        for number in range(count):
            names = {
                "train": f"train-{number:05d}",
                "validation": f"train-{count + number:05d}",
                "test": f"test-{number:05d}",
            }
            copies.append([folder / f"{name}.parquet" for name in names.values()])
            jobs += [
                pool.submit(write_copy, path, store, digest, split, number)
                for path, split in zip(copies[-1], SPLIT_NAMES, strict=True)
            ]
        for job in jobs:
            job.result()
    return copies


def growth(source: str, sizes: list[int], rounds: int, folder: Path) -> list[tuple[str, list[Built]]]:
    """The builds of each size, in turns."""
    copies = write_copies(source, folder, max(sizes))
    builds: dict[int, list[Built]] = {size: [] for size in sizes}
    for _ in range(rounds):
        for size, made in builds.items():
            with tempfile.TemporaryDirectory(dir=folder) as work:
                layout = Path(work, "source")
                layout.mkdir()
                for path in (path for copy in copies[:size] for path in copy):
                    (layout / path.name).symlink_to(path)
                made.append(in_new_process(layout, work)[0])
                print(f"{size}x: {made[-1]}", flush=True)
    return [(f"distinct, {size}x", made) for size, made in builds.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default=os.environ.get("CIFAR10_SOURCE") or "synthetic", help="as CIFAR10_SOURCE")
    parser.add_argument("--parts", nargs="+", default=["real", "growth"], choices=["real", "growth"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[1, 3, 10])
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    rows: list[tuple[str, list[Built]]] = []
    with tempfile.TemporaryDirectory() as name:
        if "real" in options.parts:
            made = []
            for _ in range(options.rounds):
                with tempfile.TemporaryDirectory(dir=name) as work:
                    made.append(in_new_process(options.source, work)[0])
            rows.append(("as they are", made))
        if "growth" in options.parts:
            rows += growth(options.source, options.sizes, options.rounds, Path(name))
    print("| images | number | seconds to import | to process | in all | ms an image | builder MB | reader MB |")
    print("|---|---|---|---|---|---|---|---|")
    for label, made in rows:
        times = [
            statistics.median(getattr(each, name) for each in made) for name in ("imported", "processed", "seconds")
        ]
        memory = [max(getattr(each, name) for each in made) for name in ("builder", "reader")]
        cells = [f"{made[0].images:,}", *(f"{each:.1f}" for each in times), f"{1000 * times[2] / made[0].images:.3f}"]
        print(f"| {label} | {' | '.join([*cells, *map(str, memory)])} |")


if __name__ == "__main__":
    main()
