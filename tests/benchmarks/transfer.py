"""Fine-tuning beside training from nothing: test accuracy with 20 images a class.

    python tests/benchmarks/transfer.py --source FOLDER --work FOLDER [--seeds 5] [--ways nothing finetune]

The source is CIFAR-10 as Parquet with encoded pictures. A `resnet18` is trained on the 5,000 images of each of five
classes and kept in the work folder, where a later run finds it. Of the other five classes, each seed draws 20 images
for training and 20 for validation, as class folders; 200 are for testing. With one seed, every way has the same images.
A run that was stopped continues from its checkpoint.
"""

import argparse
import io
import logging
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from cifar_assets.contracts import CLASSES
from cifar_assets.dataset.stores import Stores, stores_below
from cifar_assets.dataset.versions.processed import build_processed
from cifar_assets.dataset.versions.raw import build_raw_version
from cifar_assets.training.device import choose_processor, describe_environment, use_threads
from cifar_assets.training.distributed import StopSignal
from cifar_assets.training.job import run_job
from cifar_assets.training.spec import Execution, build_spec
from resources.object_store import FolderStore

KNOWN, NEW = CLASSES[::2], CLASSES[1::2]
NUM_TRAIN, NUM_VALIDATION, NUM_TEST = 20, 20, 200
NUM_START = 5000
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "nothing": ("resnet18", {}),
    "nothing-fast": ("fast", {}),
    "finetune": ("finetune", {}),
    "freeze-1": ("finetune", {"freeze": 1}),
    "freeze-3": ("finetune", {"freeze": 3}),
    "freeze-5": ("finetune", {"freeze": 5}),
}
"""Recipe and overrides of each way."""

Pictures = dict[str, list[bytes]]


def read_pictures(source: Path, split: str) -> Pictures:
    """Encoded pictures of each class, in stored order."""
    found: Pictures = defaultdict(list)
    for path in sorted(source.rglob(f"{split}*.parquet")):
        table = pq.read_table(path)
        (image,) = {"img", "image"} & set(table.column_names)
        for picture, label in zip(table[image].to_pylist(), table["label"].to_pylist(), strict=True):
            found[CLASSES[label]].append(picture["bytes"])
    return found


def write_folders(folder: Path, split: str, pictures: Pictures) -> None:
    for name, encoded in pictures.items():
        (folder / split / name).mkdir(parents=True)
        for number, data in enumerate(encoded):
            (folder / split / name / f"{number}.png").write_bytes(data)


def import_folders(stores: Stores, folder: Path) -> str:
    """Digest of the processed version of class folders."""
    return build_processed(stores.raw, stores.processed, build_raw_version(stores.raw, str(folder)).digest).digest


def train(stores: Stores, dataset: str, recipe: str, overrides: dict[str, Any], seed: int, start: str | None) -> Any:
    """The message about the model of one job, its test accuracy and its seconds."""
    before = time.perf_counter()
    spec = build_spec(
        *(stores.processed, stores.models, dataset),
        recipe=recipe,
        overrides=overrides,
        execution={},
        seed=seed,
        mlflow=None,
        start_from=start,
    )
    messages: list[dict[str, Any]] = []
    metrics = run_job(spec, StopSignal(), messages.append, io.StringIO())
    assert metrics is not None
    return messages[-1]["model_digest"], metrics["test_accuracy"], time.perf_counter() - before


def start_model(stores: Stores, note: Path, train_pictures: Pictures, test_pictures: Pictures, epochs: int) -> str:
    """Digest of the model of the known classes, trained unless the note names it."""
    if not note.exists():
        with tempfile.TemporaryDirectory() as name:
            write_folders(Path(name), "train", {each: train_pictures[each][:NUM_START] for each in KNOWN})
            write_folders(Path(name), "test", {each: test_pictures[each][:NUM_TEST] for each in KNOWN})
            dataset = import_folders(stores, Path(name))
        print("training the start", flush=True)
        digest, accuracy, seconds = train(stores, dataset, "resnet18", {"epochs": epochs}, 0, None)
        print(f"start: {accuracy:.2%} on {', '.join(KNOWN)}, {seconds:.0f} s", flush=True)
        note.write_text(digest)
    return note.read_text()


def drawn_dataset(stores: Stores, seed: int, train_pictures: Pictures, test_pictures: Pictures) -> str:
    """Digest of the few images of the new classes that a seed draws."""
    drawn = {}
    for name in NEW:
        order = np.random.default_rng(seed).permutation(len(train_pictures[name]))
        drawn[name] = [train_pictures[name][index] for index in order[: NUM_TRAIN + NUM_VALIDATION]]
    with tempfile.TemporaryDirectory() as name:
        write_folders(Path(name), "train", {each: pictures[:NUM_TRAIN] for each, pictures in drawn.items()})
        write_folders(Path(name), "validation", {each: pictures[NUM_TRAIN:] for each, pictures in drawn.items()})
        write_folders(Path(name), "test", {each: test_pictures[each][:NUM_TEST] for each in NEW})
        return import_folders(stores, Path(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder of CIFAR-10's Parquet files")
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps the start and all models")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--start-epochs", type=int, default=8)
    parser.add_argument("--verbose", action="store_true", help="show the log of each training")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING)
    use_threads(Execution())
    print(describe_environment(choose_processor(Execution(), "auto"), 1))
    stores = stores_below(FolderStore(options.work))
    pictures = read_pictures(options.source, "train"), read_pictures(options.source, "test")
    start = start_model(stores, options.work / "start", *pictures, options.start_epochs)
    accuracies: dict[str, list[float]] = {way: [] for way in options.ways}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        dataset = drawn_dataset(stores, seed, *pictures)
        for way in options.ways:
            recipe, overrides = WAYS[way]
            _, accuracy, seconds = train(
                stores, dataset, recipe, overrides, seed, start if recipe == "finetune" else None
            )
            accuracies[way].append(100 * accuracy)
            print(f"seed {seed}, {way}: {accuracy:.2%}, {seconds:.0f} s", flush=True)
    print("\n| way | n | test accuracy, mean | standard deviation |\n|---|---|---|---|")
    for way, found in accuracies.items():
        spread = f"{statistics.stdev(found):.2f}" if len(found) > 1 else ""
        print(f"| {way} | {len(found)} | {statistics.mean(found):.2f} % | {spread} |")


if __name__ == "__main__":
    main()
