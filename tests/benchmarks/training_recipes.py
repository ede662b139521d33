"""Cost of each recipe: whole jobs on real images, beside the loop of the pipeline this project replaces.

    python tests/benchmarks/training_recipes.py --source FOLDER [--recipes quick fast] [--rounds 1]

One reference epoch (RE) is the time that loop takes for 50,000 images. It is timed before and after each job, so that
what else the machine does hits both. A job counts from its start to the published model, evaluation and export
included. `--recipes quick` takes about three reference epochs. `python -m cifar_assets.seed_study` measures accuracy.
"""

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cifar_assets.dataset.versions.processed import build_processed
from cifar_assets.dataset.versions.raw import build_raw_version
from cifar_assets.training.device import choose_processor, describe_environment, use_threads
from cifar_assets.training.distributed import StopSignal
from cifar_assets.training.job import run_job
from cifar_assets.training.recipes import RECIPES, get_recipe
from cifar_assets.training.spec import Execution, JobSpec
from resources.object_store import FolderStore
from tests.benchmarks.training_throughput import Steps, baseline_loop, measure
from tests.unit.training.small_dataset import draw_split

REFERENCE_IMAGES = 50_000


def train(spec: JobSpec) -> tuple[float, float]:
    """Test accuracy and seconds of one job."""
    before = time.perf_counter()
    metrics = run_job(spec, StopSignal(), lambda message: None, io.StringIO())
    assert metrics is not None
    return metrics["test_accuracy"], time.perf_counter() - before


def measured_jobs(specs: list[JobSpec], loop: Steps, seconds: float) -> Iterator[tuple[float, float, float]]:
    """Test accuracy, seconds and reference epochs of each job in turn."""
    rate = measure(loop, seconds)
    for spec in specs:
        accuracy, took = train(spec)
        rate, last = measure(loop, seconds), rate
        yield accuracy, took, took * (rate + last) / 2 / REFERENCE_IMAGES


def main() -> None:
    parser = argparse.ArgumentParser(description="Reference epochs of each recipe.")
    parser.add_argument("--source", default="synthetic", help="images, as CIFAR10_SOURCE names them")
    parser.add_argument(
        "--recipes", nargs="+", default=sorted(set(RECIPES) - {"baseline", "finetune"}), choices=sorted(RECIPES)
    )
    parser.add_argument("--rounds", type=int, default=1, help="jobs of each recipe, with seeds from 0")
    parser.add_argument("--seconds", type=float, default=10.0, help="time of the reference loop around each job")
    options = parser.parse_args()
    use_threads(Execution())
    print(describe_environment(choose_processor(Execution(), "auto"), 1))
    images, labels = draw_split(0, "train", 2048)
    loop = baseline_loop(np.asarray(images), np.asarray(labels))
    with tempfile.TemporaryDirectory() as name:
        raw, processed, models = (FolderStore(Path(name) / part) for part in ("raw", "processed", "models"))
        digest = build_processed(raw, processed, build_raw_version(raw, options.source).digest).digest
        lines = []
        for recipe in options.recipes:
            base = {"dataset_uri": processed.uri(f"{digest}/"), "dataset_digest": digest, "output_uri": models.uri()}
            specs = [
                JobSpec.model_validate(base | {"recipe": get_recipe(recipe), "seed": seed})
                for seed in range(options.rounds)
            ]
            costs = []
            for accuracy, seconds, cost in measured_jobs(specs, loop, options.seconds):
                costs.append(cost)
                print(f"{recipe}: {accuracy:.2%}, {seconds:.0f} s, {cost:.2f} RE", flush=True)
            lines.append(f"| `{recipe}` | {len(costs)} | {statistics.median(costs):.2f} |")
    print("\n| recipe | n | RE, median |", "|---|---|---|", *lines, sep="\n")


if __name__ == "__main__":
    main()
