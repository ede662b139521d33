"""Checks of a trained model, all read from the metrics stored under its digest."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import dagster as dg
from pydantic import Field

from cifar_assets.assets.keys import TRAINED_MODEL
from cifar_assets.assets.upstream import materialized_digest
from cifar_assets.checks.results import WARN, only_selected, result, spec
from cifar_assets.contracts import CLASSES
from cifar_assets.gate import judge
from cifar_assets.model_package import METRICS_FILE, read_json, read_manifest
from resources.gate import AccuracyGate
from resources.mlflow import MlflowResource
from resources.object_store import ObjectStoreResource


class ModelCheckConfig(dg.Config):
    """Bounds beside the gate's threshold."""

    recall_floor: float = Field(default=0.4, ge=0, le=1, description="Lowest recall of any one class.")
    champion_margin: float = Field(
        default=0.02, ge=0, le=1, description="How far below the champion's test accuracy a model may be."
    )
    calibration_bound: float = Field(default=0.15, ge=0, le=1, description="Highest expected calibration error.")
    onnx_tolerance: float = Field(
        default=1e-3,
        gt=0,
        description="Highest difference between ONNX and PyTorch logits, as a share of the largest logit (at least 1).",
    )


@dg.multi_asset_check(
    name="trained_model_checks",
    can_subset=True,
    specs=[
        spec(
            TRAINED_MODEL,
            "accuracy_threshold",
            "Test accuracy reaches the gate's threshold. When it fails nothing is deployed: train longer, with more "
            "data, or by another recipe.",
            blocking=True,
        ),
        spec(
            TRAINED_MODEL,
            "metrics_finite",
            "Every loss and accuracy is a finite number. When it fails the training diverged: lower learning_rate.",
            blocking=True,
        ),
        spec(
            TRAINED_MODEL,
            "onnx_equals_torch",
            "The exported model answers as the trained one. When it fails the service would answer differently: do not "
            "deploy, and look for an operator that the exporter changed.",
            blocking=True,
        ),
        spec(
            TRAINED_MODEL,
            "recall_floor",
            "No class is forgotten. When it fails look at the confusion matrix and the class counts.",
        ),
        spec(
            TRAINED_MODEL,
            "not_worse_than_champion",
            "Test accuracy is within a margin of the champion's, on the same test split.",
        ),
        spec(
            TRAINED_MODEL,
            "calibrated",
            "Confidence means what it says: the expected calibration error is within its bound.",
        ),
    ],
)
@only_selected
def trained_model_checks(
    context: dg.AssetCheckExecutionContext,
    config: ModelCheckConfig,
    object_store: ObjectStoreResource,
    mlflow: MlflowResource,
    gate: AccuracyGate,
) -> Iterator[dg.AssetCheckResult]:
    """Six verdicts on the model that this run, or the last one, trained."""
    digest = materialized_digest(context, TRAINED_MODEL)
    manifest, verdict = judge(object_store.models, digest, gate.threshold)
    metrics = read_json(object_store.models.at(digest), manifest, METRICS_FILE)
    yield result(
        TRAINED_MODEL,
        "accuracy_threshold",
        verdict.passed,
        f"{verdict.reason[0].upper()}{verdict.reason[1:]}.",
        test_accuracy=verdict.test_accuracy,
        threshold=verdict.threshold,
        model_digest=digest,
    )
    yield _finite(metrics)
    difference = float(metrics["onnx_max_difference"])
    allowed = config.onnx_tolerance * max(1.0, float(metrics.get("onnx_largest_logit", 1.0)))
    yield result(
        TRAINED_MODEL,
        "onnx_equals_torch",
        difference <= allowed,
        f"Largest difference of logits {difference:.2e}, allowed {allowed:.1e}.",
        largest_difference=difference,
    )
    yield _recall(metrics, config.recall_floor)
    yield _against_champion(context, object_store, mlflow, digest, metrics, config.champion_margin)
    error = float(metrics["expected_calibration_error"])
    yield result(
        TRAINED_MODEL,
        "calibrated",
        error <= config.calibration_bound,
        f"Expected calibration error {error:.3f}, allowed {config.calibration_bound:.3f}.",
        severity=WARN,
        expected_calibration_error=error,
    )


def _finite(metrics: Mapping[str, Any]) -> dg.AssetCheckResult:
    numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
    for entry in metrics["history"]:
        numbers |= {f"epoch {entry['epoch']} {name}": value for name, value in entry.items()}
    bad = sorted(name for name, value in numbers.items() if isinstance(value, float) and not math.isfinite(value))
    text = f"Not finite: {', '.join(bad)}." if bad else f"All {len(numbers)} numbers are finite."
    return result(TRAINED_MODEL, "metrics_finite", not bad, text)


def _recall(metrics: Mapping[str, Any], floor: float) -> dg.AssetCheckResult:
    recalls = metrics["per_class_recall"]
    low = {name: recalls[name] for name in CLASSES if recalls[name] < floor}
    worst = min(CLASSES, key=lambda name: recalls[name])
    text = (
        f"Below {floor:.2f}: {', '.join(f'{name} {value:.3f}' for name, value in low.items())}."
        if low
        else f"Lowest is {worst} with {recalls[worst]:.3f}; the floor is {floor:.2f}."
    )
    return result(TRAINED_MODEL, "recall_floor", not low, text, severity=WARN)


def _against_champion(
    context: dg.AssetCheckExecutionContext,
    object_store: ObjectStoreResource,
    mlflow: MlflowResource,
    digest: str,
    metrics: Mapping[str, Any],
    margin: float,
) -> dg.AssetCheckResult:
    name = "not_worse_than_champion"
    try:
        champion = mlflow.champion_digest()
    except Exception as error:
        context.log.warning(f"MLflow did not answer: {error}")
        return result(TRAINED_MODEL, name, False, f"MLflow did not say which model is champion: {error}", severity=WARN)
    if champion is None or champion == digest:
        return result(TRAINED_MODEL, name, True, "There is no other champion to compare with.", severity=WARN)
    package = object_store.models.at(champion)
    accuracy = float(read_json(package, read_manifest(package, champion), METRICS_FILE)["test_accuracy"])
    own = float(metrics["test_accuracy"])
    return result(
        TRAINED_MODEL,
        name,
        own >= accuracy - margin,
        f"Test accuracy {own:.4f}; champion {champion[:12]} has {accuracy:.4f}, margin {margin:.4f}.",
        severity=WARN,
        champion_digest=champion,
        champion_accuracy=accuracy,
    )
