"""Metadata that the Dagster UI shows for each materialization: tables, plots and pictures rather than raw JSON."""

import base64
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import dagster as dg
import numpy as np

from cifar_assets.dataset.sheet import captioned_sheet, sample_sheet
from cifar_assets.dataset.versions.lineage import changes_since
from cifar_assets.dataset.versions.processed import ProcessedVersion
from cifar_assets.dataset.versions.raw import RawVersion
from cifar_assets.dataset.versions.reader import open_split
from cifar_assets.dataset.versions.splits import SPLIT_NAMES
from cifar_assets.gate import default_threshold
from cifar_assets.model_package import (
    CARD_FILE,
    METRICS_FILE,
    PERFORMANCE_FILE,
    ModelManifest,
    read_json,
    read_manifest,
)
from cifar_assets.traffic.records import Traffic
from resources.errors import ExplainedError, ObjectNotFoundError
from resources.inference_service import DeployedService
from resources.mlflow.resource import RUN_METADATA, MlflowResource
from resources.object_store import ObjectStore
from resources.trainer.interface import TrainingResult
from resources.verdict import Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_ROWS = 50
_MAX_PICTURES = 60
_DPI = 80
_NUMBERS = ("test_accuracy", "test_loss", "expected_calibration_error", "onnx_max_difference", "int8_test_accuracy")
_DIGEST = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{52}\b")
Metadata = dict[str, Any]


def shown(value: Any) -> Any:
    """A number rounded to four digits for display. A non-finite number becomes text: JSON has no NaN."""
    if value is None:
        return "unknown"
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return str(value)
    return float(f"{value:.4g}") if abs(value) < 1000 else round(value, 1)


def table(rows: Iterable[Mapping[str, str | int | float | bool | None]]) -> dg.MetadataValue:
    """Rows as a table in the UI, with short digests; columns and their types follow from the first row."""
    records = [dg.TableRecord({name: _cell(value) for name, value in row.items()}) for row in rows]
    return dg.MetadataValue.table(records) if records else dg.MetadataValue.text("none")


def _cell(value: Any) -> Any:
    return _DIGEST.sub(r"\1...", value) if isinstance(value, str) else None if value is None else shown(value)


def of_raw(raw: ObjectStore, version: RawVersion) -> Metadata:
    """Size, objects, and the outcome for every landed object."""
    manifest, landing = version.manifest, version.landing
    columns = ("key", "format", "role", "rows", "used_rows", "size", "sha256")
    duplicates = {key: f"{count} images are already in the dataset" for key, count in landing.duplicates.items()}
    tables = {
        "left_out_of_source": [{"reason": reason, "rows": count} for reason, count in version.left_out.items()],
        "unread_of_source": [{"name": key, "reason": reason} for key, reason in version.unread.items()],
        "skipped": [{"name": key, "reason": reason} for key, reason in landing.skipped.items()],
        "duplicates": [{"name": key, "reason": reason} for key, reason in duplicates.items()],
        "rejected": [
            {"key": item.key, "rows": len(item.rows) or None, "reason": item.reason, "moved_to": item.moved_to or ""}
            for item in landing.rejected
        ],
    }
    return {
        "dagster/row_count": manifest.rows,
        "source": version.source,
        "assumed": "; ".join(version.assumed) or "nothing",
        "uri": raw.uri(f"versions/{version.digest}/manifest.json"),
        "size_bytes": manifest.size,
        "num_objects": len(manifest.objects),
        "num_landed_accepted": sum(landing.accepted.values()),
        "num_landed_duplicates": sum(landing.duplicates.values()),
        "num_landed_rejected": landing.rejected_rows,
        "num_landed_unread": landing.unread,
        "num_source_unread": len(version.unread),
        "objects": table({name: getattr(item, name) for name in columns} for item in manifest.objects),
        **{name: table(rows[:_MAX_ROWS]) for name, rows in tables.items() if rows},
    }


def of_processed(processed: ObjectStore, version: ProcessedVersion, previous: str | None) -> Metadata:
    """Counts by class and split, channel statistics, samples, and what changed since the previous version."""
    manifest = version.manifest
    return {
        "dagster/row_count": sum(manifest.count(split) for split in SPLIT_NAMES),
        **{f"num_{split}": manifest.count(split) for split in SPLIT_NAMES},
        "uri": processed.uri(f"{version.digest}/"),
        "size_bytes": version.manifest.size,
        "built_before": version.reused,
        "raw_digest": manifest.raw_digest,
        "counts": table(
            {"class": name, **{split: manifest.counts[split][name] for split in SPLIT_NAMES}}
            for name in manifest.classes
        ),
        "channels": table(
            {"channel": name, "mean": mean, "std": std}
            for name, mean, std in zip(("red", "green", "blue"), manifest.mean, manifest.std, strict=True)
        ),
        "samples": picture(
            "training images by class", lambda: sample_sheet(open_split(processed, version.digest, "train"))
        ),
        **(_changes(processed, version.digest, previous) if previous else {}),
    }


def _changes(processed: ObjectStore, digest: str, previous: str) -> Metadata:
    try:
        changes = changes_since(processed, digest, previous)
    except ExplainedError as error:  # the earlier version was pruned or damaged; this does not affect the new one
        return {"previous_digest": previous, "changes": f"The previous version cannot be read: {error}"}
    rows = ({"split": split, "added": changes.added[split], "removed": changes.removed[split]} for split in SPLIT_NAMES)
    return {"previous_digest": previous, "changes": table(rows)}


def of_model(models: ObjectStore, result: TrainingResult, mlflow: MlflowResource, threshold: float | None) -> Metadata:
    """Quality and cost of the training, its curves and confusion matrix; the model card has the recipe and recalls."""
    package = models.at(result.model_digest)
    manifest = read_manifest(package, result.model_digest)
    metrics = read_json(package, manifest, METRICS_FILE)
    card = {"model_card": dg.MetadataValue.md(package.read(CARD_FILE).decode())} if package.exists(CARD_FILE) else {}
    return {
        **{name: shown(metrics.get(name)) for name in _NUMBERS},
        "threshold": default_threshold(manifest, metrics) if threshold is None else threshold,
        "model_digest": result.model_digest,
        "model_version": result.mlflow_model_version or "not registered",
        "dataset_digest": manifest.dataset_digest,
        "raw_digest": manifest.raw_digest,
        "started_from": manifest.start_model or manifest.start_weights or "random weights",
        "uri": result.model_uri,
        "resumed_from": result.resumed_from or "the start",
        RUN_METADATA: mlflow.run_link(result.mlflow_run_id),
        "curves": picture("loss and accuracy by epoch", lambda: training_curves(metrics["history"])),
        "confusion": picture(
            "confusion matrix of the test split",
            lambda: confusion_matrix(metrics["confusion_matrix"], manifest.classes),
        ),
        **_of_performance(package),
        **card,
    }


def _of_performance(package: ObjectStore) -> Metadata:
    """Speed and time of the training. The digest does not cover them, so they may be missing or invalid."""
    try:
        found = json.loads(package.read(PERFORMANCE_FILE))
        numbers = {name: shown(found.get(name)) for name in ("images_per_second", "train_seconds")}
        return {**numbers, "mlflow_unsent": ", ".join(found.get("mlflow_unsent", ())) or "nothing"}
    except (ObjectNotFoundError, ValueError, TypeError, AttributeError) as error:
        return {"performance": f"unknown: {error}"}


def of_verdict(model_digest: str, verdict: Verdict) -> Metadata:
    """The gate's decision, with both numbers."""
    return {
        "gate": "passed" if verdict.passed else "refused",
        "gate_reason": verdict.reason,
        "model_digest": model_digest,
        "test_accuracy": shown(verdict.numbers["test_accuracy"]),
        "threshold": verdict.numbers["threshold"],
    }


def of_service(service: DeployedService, manifest: ModelManifest, model_name: str) -> Metadata:
    """The model's endpoint, the model it replaced, and the data it was trained on."""
    predict_url = f"{service.url}/v1/models/{model_name}:predict"
    return {
        "url": dg.MetadataValue.url(service.url),
        "model_version": service.model_version,
        "previous_digest": service.previous_digest or "none",
        "changed": service.changed,
        "dataset_digest": manifest.dataset_digest,
        "raw_digest": manifest.raw_digest,
        "example": dg.MetadataValue.md(f"```\ncurl -F image=@picture.png {predict_url}\n```"),
        **{f"service_{name}": value for name, value in service.details.items()},
    }


def of_traffic(by_model: Sequence[Traffic]) -> Metadata:
    """Numbers of all models' traffic; classes, confidence, latency and pictures of the model that was recorded last."""
    responses = sum((Counter(traffic.info.responses) for traffic in by_model), Counter[str]())
    counts = {
        "dagster/row_count": sum(map(len, by_model)),
        "num_requests": responses.total(),
        "num_refused": sum(number for status, number in responses.items() if status.startswith("4")),
        "num_failed": sum(number for status, number in responses.items() if status.startswith("5")),
        "responses": table({"status": status, "responses": number} for status, number in sorted(responses.items())),
        "models": table(
            {"model": each.info.model_digest, "version": each.info.model_version, "images": len(each)}
            for each in by_model
        ),
    }
    newest = by_model[-1] if by_model and len(by_model[-1]) else None
    return {**counts, **(_of_answers(newest) if newest else {})}


def _of_answers(traffic: Traffic) -> Metadata:
    classes, probabilities = traffic.info.images.classes, traffic.probabilities
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    p50, p99 = np.percentile(traffic.column("seconds"), (50, 99)) * 1000
    numbers = np.bincount(predicted, minlength=len(classes))
    least = np.argsort(confidence, kind="stable")[:_MAX_PICTURES].tolist()
    captions = [f"{classes[predicted[row]]} {confidence[row]:.0%}" for row in least]
    return {
        "median_confidence": shown(float(np.median(confidence))),
        "latency_p50_milliseconds": shown(float(p50)),
        "latency_p99_milliseconds": shown(float(p99)),
        "classes": table(
            {
                "class": name,
                "images": int(numbers[label]),
                "fraction": float(numbers[label] / len(traffic)),
                "median_confidence": float(np.median(confidence[predicted == label])) if numbers[label] else None,
            }
            for label, name in enumerate(classes)
        ),
        "plots": picture("images by class and confidence", lambda: traffic_plots(numbers, confidence, classes)),
        "least_certain": picture(
            "pictures, the least certain first",
            lambda: captioned_sheet([traffic.image(row) for row in least], captions),
        ),
    }


def traffic_plots(numbers: np.ndarray, confidence: np.ndarray, classes: Sequence[str]) -> bytes:
    """Images by predicted class, and a histogram of the confidence. PNG."""
    figure = _figure(8, 3)
    bars, histogram = figure.subplots(1, 2)
    bars.barh(classes, numbers)
    bars.invert_yaxis()
    bars.set_xlabel("images")
    histogram.hist(confidence, bins=20, range=(0, 1))
    histogram.set_xlabel("confidence")
    return _png(figure)


def training_curves(history: Sequence[Mapping[str, float]]) -> bytes:
    """Loss and accuracy over epochs as PNG, from the per-epoch entries of metrics.json."""
    figure = _figure(8, 3)
    loss, accuracy = figure.subplots(1, 2)
    epochs = [entry["epoch"] for entry in history]
    for axes, names in ((loss, ("train_loss", "validation_loss")), (accuracy, ("validation_accuracy",))):
        for name in names:
            axes.plot(epochs, [entry[name] for entry in history], marker="o", label=name.replace("_", " "))
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.legend()
    return _png(figure)


def confusion_matrix(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> bytes:
    """Rows are true classes, columns predicted ones; shades are fractions of a row, numbers are images. PNG."""
    matrix = np.asarray(counts)
    fractions = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    figure = _figure(6, 5.4)
    axes = figure.subplots()
    axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    for row, column in np.ndindex(matrix.shape):
        color = "white" if fractions[row, column] > 0.5 else "black"
        axes.text(column, row, str(matrix[row, column]), ha="center", va="center", fontsize=7, color=color)
    return _png(figure)


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def picture(title: str, draw: Callable[[], bytes]) -> dg.MetadataValue:
    """A picture embedded in Markdown, so that the UI needs no file server. If drawing fails, the text gives the error:
    a picture must not fail the step.
    """
    try:
        return dg.MetadataValue.md(f"![{title}](data:image/png;base64,{base64.b64encode(draw()).decode()})")
    except Exception as error:
        return dg.MetadataValue.text(f"could not be drawn: {type(error).__name__}: {error}")
