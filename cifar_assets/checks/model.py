"""Checks of a trained model, all based on the metrics stored under its digest."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import dagster as dg
from pydantic import Field

from cifar_assets.assets.binding import data_set_checks
from cifar_assets.assets.common import AccuracyGate
from cifar_assets.assets.keys import TRAINED_MODEL, key_of
from cifar_assets.assets.record import materialized_digest
from cifar_assets.checks.results import answers, declare
from cifar_assets.checks.shadow import ShadowConfig, judge_shadow
from cifar_assets.data_set import DataSet
from cifar_assets.gate import ONNX_TOLERANCE, judge_model, number, read_metrics
from cifar_assets.model_package import read_manifest
from resources.mlflow.resource import MlflowResource
from resources.object_store import ObjectStore
from resources.object_store.resource import ObjectStoreResource
from resources.verdict import Verdict


class ModelCheckConfig(dg.Config):
    """Bounds of the checks other than the gate's threshold."""

    recall_floor: float = Field(default=0.4, ge=0, le=1, description="Lowest allowed recall of any class.")
    champion_margin: float = Field(
        default=0.02, ge=0, le=1, description="How far a model's test accuracy may be below the champion's."
    )
    calibration_bound: float = Field(
        default=0.15, ge=0, le=1, description="Highest allowed expected calibration error."
    )
    onnx_tolerance: float = Field(
        default=ONNX_TOLERANCE,
        gt=0,
        description="Largest allowed difference of ONNX and PyTorch logits, as a fraction of the largest (at least 1).",
    )
    shadow: ShadowConfig = Field(default=ShadowConfig(), description="Comparison with the served model on its traffic.")


MODEL_CHECKS = declare(
    TRAINED_MODEL,
    blocking={
        "accuracy_threshold": "Test accuracy reaches the gate's threshold. If it fails, nothing is deployed: train "
        "longer, with more data, or with another recipe.",
        "metrics_finite": "Every loss and accuracy is a finite number. If it fails, the training diverged: lower "
        "learning_rate.",
        "onnx_equals_torch": "The exported model gives the same predictions as the trained one. If it fails, the "
        "service would predict differently: do not deploy, and look for an operator that the exporter changed.",
    },
    warning={
        "recall_floor": "Every class is recognized. If it fails, look at the confusion matrix and the class counts.",
        "not_worse_than_champion": "Test accuracy is within a margin of the champion's, on the same test split.",
        "calibrated": "Confidence is calibrated: the expected calibration error is within its bound.",
        "shadow_agrees": "The model usually predicts the same class as the served model for the pictures that it was "
        "sent. If it fails, look at the pictures that differ before you deploy.",
    },
)


@data_set_checks(MODEL_CHECKS)
def trained_model_checks(
    data_set: DataSet,
    context: dg.AssetCheckExecutionContext,
    config: ModelCheckConfig,
    object_store: ObjectStoreResource,
    mlflow: MlflowResource,
    gate: AccuracyGate,
) -> Iterator[dg.AssetCheckResult]:
    """Results for the model that this run trained, otherwise the newest one."""
    digest = materialized_digest(context, key_of(data_set, TRAINED_MODEL))
    models = object_store.models
    metrics = cache(lambda: read_metrics(models, digest))
    judges = {
        **judge_model(models, digest, gate.threshold, config.onnx_tolerance, gate.public_keys),
        "recall_floor": lambda: recall_reached(
            metrics(), read_manifest(models.at(digest), digest).classes, config.recall_floor
        ),
        "not_worse_than_champion": lambda: _against_champion(models, mlflow, digest, config.champion_margin),
        "calibrated": lambda: calibrated(metrics(), config.calibration_bound),
        "shadow_agrees": lambda: judge_shadow(object_store, digest, config.shadow, gate.public_keys),
    }
    yield from answers(context, MODEL_CHECKS(data_set), digest, judges)


def recall_reached(metrics: Mapping[str, Any], classes: Sequence[str], floor: float) -> Verdict:
    """No class of the test split is hardly ever recognized. A class without test images has no recall."""
    recalls = {name: metrics["per_class_recall"].get(name) for name in classes}
    missing = [name for name, value in recalls.items() if value is None]
    known = {name: float(value) for name, value in recalls.items() if value is not None}
    low = [f"{name} {value:.3f}" for name, value in known.items() if not value >= floor]
    texts = [f"No test images of {', '.join(missing)}."] if missing else []
    if low:
        texts.append(f"Below {floor:.2f}: {', '.join(low)}.")
    elif known:
        worst = min(known, key=lambda name: known[name])
        texts.append(f"Lowest is {worst} with {known[worst]:.3f}; the floor is {floor:.2f}.")
    return Verdict(not low and not missing, " ".join(texts))


def calibrated(metrics: Mapping[str, Any], bound: float) -> Verdict:
    """The expected calibration error is within its bound."""
    error = number(metrics, "expected_calibration_error")
    text = f"Expected calibration error {error:.3f}, allowed {bound:.3f}."
    return Verdict(error <= bound, text, {"expected_calibration_error": error})


def _against_champion(models: ObjectStore, mlflow: MlflowResource, digest: str, margin: float) -> Verdict:
    champion = mlflow.champion_digest()
    if champion is None or champion == digest:
        return Verdict(True, "There is no other champion to compare to.")
    accuracy = number(read_metrics(models, champion), "test_accuracy")
    own = number(read_metrics(models, digest), "test_accuracy")
    return Verdict(
        own >= accuracy - margin,
        f"Test accuracy {own:.4f}; champion {champion[:12]} has {accuracy:.4f}, margin {margin:.4f}.",
        {"champion_digest": champion, "champion_accuracy": accuracy},
    )
