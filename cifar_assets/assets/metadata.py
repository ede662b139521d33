"""What the Dagster UI shows of each materialization: tables, plots and pictures rather than raw JSON."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import dagster as dg

from cifar_assets.contracts import CLASSES, MODEL_NAME
from cifar_assets.dataset.sheet import sample_sheet
from cifar_assets.dataset.versions.lineage import changes_since
from cifar_assets.dataset.versions.processed import ProcessedVersion
from cifar_assets.dataset.versions.raw import RawVersion
from cifar_assets.dataset.versions.reader import open_split
from cifar_assets.dataset.versions.splits import SPLIT_NAMES
from cifar_assets.model_package import (
    CARD_FILE,
    METRICS_FILE,
    PERFORMANCE_FILE,
    RECIPE_FILE,
    ModelManifest,
    read_json,
    read_manifest,
)
from cifar_assets.pictures import as_markdown, confusion_matrix, training_curves
from resources.errors import ExplainedError, ObjectNotFoundError
from resources.inference_service import DeployedService
from resources.mlflow.resource import RUN_METADATA, MlflowResource
from resources.object_store import ObjectStore
from resources.trainer.interface import TrainingResult
from resources.verdict import Verdict

_MAX_REJECTED_SHOWN = 50
_NUMBERS = ("test_accuracy", "test_loss", "expected_calibration_error", "onnx_max_difference")
Metadata = dict[str, Any]


def table(rows: Iterable[Mapping[str, str | int | float | bool | None]]) -> dg.MetadataValue:
    """Rows as a table in the UI; columns and their types follow from the first row, so none needs no table."""
    records = [dg.TableRecord(dict(row)) for row in rows]
    return dg.MetadataValue.table(records) if records else dg.MetadataValue.text("none")


def of_raw(raw: ObjectStore, version: RawVersion) -> Metadata:
    """Size, objects, and what became of everything that landed."""
    landing = version.landing
    metadata: Metadata = {
        "dagster/row_count": version.manifest.rows,
        "source": version.source,
        "uri": raw.uri(f"versions/{version.digest}/manifest.json"),
        "size_bytes": version.manifest.size,
        "num_objects": len(version.manifest.objects),
        "num_landed_accepted": sum(landing.accepted.values()),
        "num_landed_duplicates": sum(landing.duplicates.values()),
        "num_landed_rejected": landing.rejected_rows,
        "num_landed_unread": landing.unread,
        "num_source_unread": len(version.unread),
        "objects": table(
            {
                "key": item.key,
                "format": item.format,
                "role": item.role,
                "rows": item.rows,
                "used_rows": item.used_rows,
                "bytes": item.size,
                "sha256": item.sha256,
            }
            for item in version.manifest.objects
        ),
    }
    if version.left_out:
        metadata["left_out_of_source"] = table(
            {"reason": reason, "rows": count} for reason, count in version.left_out.items()
        )
    duplicates = {key: f"{count} images are in the dataset already" for key, count in landing.duplicates.items()}
    unused = {"unread_of_source": version.unread, "skipped": landing.skipped, "duplicates": duplicates}
    for name, reasons in unused.items():
        if reasons:
            metadata[name] = table(
                {"name": key, "reason": reason} for key, reason in list(reasons.items())[:_MAX_REJECTED_SHOWN]
            )
    if landing.rejected:
        metadata["rejected"] = table(
            {"key": item.key, "rows": len(item.rows) or None, "reason": item.reason, "moved_to": item.moved_to or ""}
            for item in landing.rejected[:_MAX_REJECTED_SHOWN]
        )
    return metadata


def of_processed(processed: ObjectStore, version: ProcessedVersion, previous: str | None) -> Metadata:
    """Counts by class and split, channel statistics, samples, and what changed since the previous version."""
    manifest = version.manifest
    metadata: Metadata = {
        "dagster/row_count": sum(manifest.count(split) for split in SPLIT_NAMES),
        **{f"num_{split}": manifest.count(split) for split in SPLIT_NAMES},
        "uri": processed.uri(f"{version.digest}/"),
        "size_bytes": manifest.size,
        "built_before": version.reused,
        "raw_digest": manifest.raw_digest,
        "counts": table(
            {"class": name, **{split: manifest.counts[split][name] for split in SPLIT_NAMES}} for name in CLASSES
        ),
        "channels": table(
            {"channel": name, "mean": mean, "std": std}
            for name, mean, std in zip(("red", "green", "blue"), manifest.mean, manifest.std, strict=True)
        ),
        "samples": _picture(
            "training images by class", lambda: sample_sheet(open_split(processed, version.digest, "train"))
        ),
    }
    if previous is not None:
        metadata |= {"previous_digest": previous, **_changes(processed, version.digest, previous)}
    return metadata


def _changes(processed: ObjectStore, digest: str, previous: str) -> Metadata:
    try:
        changes = changes_since(processed, digest, previous)
    except ExplainedError as error:  # the earlier version was pruned or damaged; the new one is good all the same
        return {"changes": f"The previous version cannot be read: {error}"}
    rows = ({"split": split, "added": changes.added[split], "removed": changes.removed[split]} for split in SPLIT_NAMES)
    return {
        "changes": table(rows),
        "num_moved_between_splits": changes.moved,
        "num_relabelled": changes.relabelled,
    }


def of_model(models: ObjectStore, result: TrainingResult, mlflow: MlflowResource, threshold: float) -> Metadata:
    """Quality and cost of the training, its curves and its confusion matrix."""
    package = models.at(result.model_digest)
    manifest = read_manifest(package, result.model_digest)
    metrics = read_json(package, manifest, METRICS_FILE)
    recipe = read_json(package, manifest, RECIPE_FILE)
    metadata: Metadata = {
        **{name: shown(metrics.get(name)) for name in _NUMBERS},
        "threshold": threshold,
        "model_digest": result.model_digest,
        "model_version": result.mlflow_model_version or "not registered",
        "dataset_digest": manifest.dataset_digest,
        "raw_digest": manifest.raw_digest,
        "uri": result.model_uri,
        "resumed_from": result.resumed_from or "the start",
        RUN_METADATA: mlflow.run_link(result.mlflow_run_id),
    }
    metadata["curves"] = _picture("loss and accuracy by epoch", lambda: training_curves(metrics["history"]))
    metadata["confusion"] = _picture(
        "confusion matrix of the test split", lambda: confusion_matrix(metrics["confusion_matrix"], CLASSES)
    )
    metadata |= _of_performance(package)
    if package.exists(CARD_FILE):
        metadata["model_card"] = dg.MetadataValue.md(package.read(CARD_FILE).decode())
    recalls = metrics.get("per_class_recall", {})
    metadata["recall"] = table({"class": name, "recall": _recall_text(recalls.get(name))} for name in CLASSES)
    metadata["recipe"] = table({"field": name, "value": str(value)} for name, value in recipe.items())
    return metadata


def _of_performance(package: ObjectStore) -> Metadata:
    """Speed and time of the training. The digest does not cover them, so they may be missing or anything."""
    try:
        found = json.loads(package.read(PERFORMANCE_FILE))
        return {
            "images_per_second": shown(found.get("images_per_second")),
            "train_seconds": shown(found.get("train_seconds")),
            "mlflow_unsent": ", ".join(found.get("mlflow_unsent", ())) or "nothing",
            "phases": table(
                {"phase": name, "seconds": seconds} for name, seconds in found.get("seconds_per_phase", {}).items()
            ),
        }
    except (ObjectNotFoundError, ValueError, TypeError, AttributeError) as error:
        return {"performance": f"unknown: {error}"}


def _picture(title: str, draw: Callable[[], bytes]) -> dg.MetadataValue:
    """A picture for the UI. One that cannot be drawn says why: it must not fail what it only shows."""
    try:
        return dg.MetadataValue.md(as_markdown(draw(), title))
    except Exception as error:
        return dg.MetadataValue.text(f"could not be drawn: {type(error).__name__}: {error}")


def _recall_text(recall: float | None) -> str:
    return "no test images" if recall is None else f"{recall:.3f}"


def shown(value: float | str | None) -> float | str:
    """A number as metadata. What is missing or not finite becomes text: the UI reads JSON, which has no NaN."""
    if value is None:
        return "unknown"
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def of_verdict(verdict: Verdict) -> Metadata:
    """The gate's decision, with both numbers."""
    return {
        "gate": "passed" if verdict.passed else "refused",
        "gate_reason": verdict.reason,
        "model_digest": verdict.model_digest,
        "test_accuracy": verdict.test_accuracy,
        "threshold": verdict.threshold,
    }


def of_service(service: DeployedService, manifest: ModelManifest, verdict: Verdict) -> Metadata:
    """Where the model answers, what it replaced and which data made it."""
    predict_url = f"{service.url}/v1/models/{MODEL_NAME}:predict"
    return {
        **of_verdict(verdict),
        "url": dg.MetadataValue.url(service.url),
        "model_version": service.model_version,
        "previous_digest": service.previous_digest or "none",
        "changed": service.changed,
        "dataset_digest": manifest.dataset_digest,
        "raw_digest": manifest.raw_digest,
        "example": dg.MetadataValue.md(f"```\ncurl -F image=@picture.png {predict_url}\n```"),
        **{f"service_{name}": value for name, value in service.details.items()},
    }
