"""What is told of a trained model: metrics, performance and the model card."""

from dataclasses import asdict
from typing import Any

from cifar_assets.contracts import CLASSES
from cifar_assets.training.spec import JobSpec
from cifar_assets.training.state import EpochRecord

_REPEATABLE = ("epoch", "train_loss", "validation_loss", "validation_accuracy", "learning_rate", "resolution")


def build_metrics(
    spec: JobSpec,
    raw_digest: str,
    test: dict[str, Any],
    validation: dict[str, Any],
    history: list[EpochRecord],
    extra: dict[str, Any],
) -> dict[str, Any]:
    """The metrics document. It holds nothing that differs between two runs of one job: no times, no host."""
    return {
        "test_accuracy": test["accuracy"],
        "test_loss": test["loss"],
        "test_images": test["images"],
        "validation_accuracy": validation["accuracy"],
        "validation_loss": validation["loss"],
        "validation_images": validation["images"],
        "per_class_recall": test["per_class_recall"],
        "confusion_matrix": test["confusion_matrix"],
        "expected_calibration_error": test["expected_calibration_error"],
        "views": spec.recipe.views,
        "history": [{key: asdict(record)[key] for key in _REPEATABLE} for record in history],
        "dataset_digest": spec.dataset_digest,
        "raw_digest": raw_digest,
        "seed": spec.seed,
        **extra,
    }


def build_performance(
    phases: dict[str, float], history: list[EpochRecord], resumed_from: int | None, num_train: int
) -> dict[str, Any]:
    """Speed and time. Training seconds are those of all epochs, also when a run was continued in another process."""
    train_seconds = sum(record.seconds for record in history)
    return {
        "images_per_second": num_train * len(history) / train_seconds if train_seconds else None,
        "train_seconds": train_seconds,
        "seconds_per_phase": {name: round(seconds, 3) for name, seconds in phases.items()},
        "epochs": [
            {"epoch": r.epoch, "seconds": round(r.seconds, 3), "images_per_second": round(r.images_per_second, 1)}
            for r in history
        ],
        "resumed_from_step": resumed_from,
        "mlflow_unsent": [],
    }


def model_card(spec: JobSpec, metrics: dict[str, Any], performance: dict[str, Any], environment: dict[str, Any]) -> str:
    """The model card, in Markdown."""
    recipe = spec.recipe
    views = {"plain": "", "mirrored": " (mean over each image and its mirror image)", "six": " (mean over six views)"}
    recalls = "\n".join(f"| {name} | {_percent(metrics['per_class_recall'][name])} |" for name in CLASSES)
    settings = "\n".join(f"| {name} | `{value}` |" for name, value in recipe.model_dump(mode="json").items())
    return f"""# CIFAR-10 classifier, recipe `{recipe.name}`

Sorts 32x32 colour pictures into ten classes: {", ".join(CLASSES)}.
Made to try and to show a training and serving pipeline.
It always answers with one of these classes, whatever the picture shows.

## Results

| measure | value |
|---|---|
| test accuracy{views[recipe.views]} | {_percent(metrics["test_accuracy"])} of {metrics["test_images"]} images |
| test loss | {metrics["test_loss"]:.4f} |
| validation accuracy | {_percent(metrics["validation_accuracy"])} of {metrics["validation_images"]} images |
| expected calibration error | {metrics["expected_calibration_error"]:.4f} |
| largest difference of ONNX logits | {metrics["onnx_max_difference"]:.2e} on {metrics["onnx_images"]} images |
| parameters | {metrics["parameters"]:,} |

The test split was looked at once, after training.
One training with seed {spec.seed}: it says nothing of the spread over seeds.

| class | recall |
|---|---|
{recalls}

## Origin

- processed dataset: `{metrics["dataset_digest"]}`
- raw dataset: `{metrics["raw_digest"]}`
- training images: {metrics["train_images"]}

| recipe | |
|---|---|
{settings}

## How it ran

{performance["train_seconds"]:.0f} s of training steps at {performance["images_per_second"]:.0f} images/s.

| | |
|---|---|
| processor | {environment["cpu"]} |
| CPUs, processes, threads each | {environment["cpus"]:g}, {environment["processes"]}, {environment["threads"]} |
| device, precision | {environment["device"]}, {environment["precision"]} |
| torch, Python | {environment["packages"].get("torch")}, {environment["python"]} |
"""


def _percent(value: float | None) -> str:
    return "no images" if value is None else f"{100 * value:.2f} %"
