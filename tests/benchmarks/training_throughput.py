"""Images/s of the trainer side by side with a loop as the pipeline it replaces has it, in turns on one machine.

    python tests/benchmarks/training_throughput.py [--rounds 5] [--seconds 4]

The baseline loop decodes nothing: PIL images in memory, torchvision's transforms in a DataLoader's worker, float32,
batches of 32. Each round runs every candidate for a few seconds, so that what else the machine does hits all alike; the
ratio of each round is taken to the baseline loop of the same round. Drawn images: speed does not depend on pictures.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import models, transforms

from cifar_assets.training.checkpoint import CheckpointStore
from cifar_assets.training.data import EpochAugmentation, epoch_batches, open_data
from cifar_assets.training.device import choose_processor, describe_environment, use_threads
from cifar_assets.training.distributed import Processes, StopSignal
from cifar_assets.training.loop import Trainer
from cifar_assets.training.recipes import get_recipe
from cifar_assets.training.spec import JobSpec
from resources.object_store import FolderStore
from tests.unit.training.small_dataset import store_dataset

NUM_IMAGES = 8192
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

Steps = Iterator[int]
"""Does one optimizer step at a time and gives the number of images in it."""


class PilImages(Dataset[tuple[torch.Tensor, int]]):
    """What torchvision.datasets.CIFAR10 gives: a PIL image a time, through the transforms."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self._images = images
        self._labels = labels
        self._transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        pixels = cast(torch.Tensor, self._transform(Image.fromarray(self._images[index])))
        return pixels, int(self._labels[index])


def baseline_loop(images: np.ndarray, labels: np.ndarray) -> Steps:
    """The loop of the pipeline this project replaces."""
    network = models.resnet18(num_classes=10)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    loss_function = nn.CrossEntropyLoss()
    hwc = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    loader = DataLoader(PilImages(hwc, labels), batch_size=32, shuffle=True, num_workers=1, persistent_workers=True)
    while True:
        for pixels, targets in loader:
            optimizer.zero_grad()
            loss_function(network(pixels), targets).backward()
            optimizer.step()
            yield len(targets)


def trainer(spec: JobSpec) -> Steps:
    """This project's loop on one recipe: the very step that a job takes, without validation and checkpoints."""
    processor = choose_processor(spec.execution, spec.recipe.precision)
    data = open_data(spec, processor.device)
    checkpoints = CheckpointStore(FolderStore(Path(tempfile.mkdtemp())), 1)
    job = Trainer(spec, data, processor, Processes(), checkpoints, StopSignal())
    augmentation = EpochAugmentation(spec.recipe, spec.seed, 0, len(data.train), data.manifest.image_size)
    for epoch in itertools.count():
        for batch in epoch_batches(spec.seed, epoch, len(data.train), spec.recipe.batch_size):
            job.step(job.state.network, batch, augmentation)
            yield len(batch)


def measure(steps: Steps, seconds: float) -> float:
    """Images/s over about that time, at least two steps; one step before is not counted."""
    next(steps)
    images, count, before = 0, 0, time.perf_counter()
    while count < 2 or time.perf_counter() - before < seconds:
        images += next(steps)
        count += 1
    return images / (time.perf_counter() - before)


def candidates(bucket: Path) -> dict[str, Callable[[], Steps]]:
    """What is compared, by name; the baseline loop first."""
    digest = store_dataset(bucket, train=NUM_IMAGES)
    base = {
        "dataset_uri": FolderStore(bucket).uri(f"{digest}/"),
        "dataset_digest": digest,
        "output_uri": "file:///unused/",
    }

    def ours(recipe: str) -> Steps:
        return trainer(JobSpec.model_validate(base | {"recipe": get_recipe(recipe)}))

    split = open_data(JobSpec.model_validate(base | {"recipe": get_recipe("baseline")}), torch.device("cpu")).train
    images = split.images(np.arange(NUM_IMAGES)).numpy()
    return {
        "baseline loop": lambda: baseline_loop(images, split.labels.numpy()),
        "recipe baseline": lambda: ours("baseline"),
        "recipe quick": lambda: ours("quick"),
        "recipe resnet18": lambda: ours("resnet18"),
        "recipe fast": lambda: ours("fast"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Images/s of the trainer beside a baseline loop.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0, help="time of each candidate in each round")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        made = candidates(Path(name))
        spec_execution = JobSpec.model_fields["execution"].get_default(call_default_factory=True)
        use_threads(spec_execution)
        print(describe_environment(choose_processor(spec_execution, "auto"), 1))
        loops = {label: make() for label, make in made.items()}
        rates: dict[str, list[float]] = {label: [] for label in loops}
        for number in range(1, options.rounds + 1):
            for label, steps in loops.items():
                rates[label].append(measure(steps, options.seconds))
            print(f"round {number}: " + ", ".join(f"{label} {values[-1]:.0f}" for label, values in rates.items()))
    base = rates["baseline loop"]
    print(f"\n| loop | images/s, median of {options.rounds} | best | ratio to baseline, median (least - most) |")
    print("|---|---|---|---|")
    for label, values in rates.items():
        ratios = [value / other for value, other in zip(values, base, strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"
        print(f"| {label} | {statistics.median(values):.0f} | {max(values):.0f} | {spread} |")


if __name__ == "__main__":
    main()
