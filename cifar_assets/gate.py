"""Whether a stored model may be served: its test accuracy against the current threshold, and other blocking checks."""

import math
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from cifar_assets.contracts import CIFAR10_THRESHOLD
from cifar_assets.model_package import (
    INT8_FILE,
    METRICS_FILE,
    RECIPE_FILE,
    ModelManifest,
    ServedPrecision,
    WantedPrecision,
    read_json,
    read_manifest,
    verify_package,
)
from cifar_assets.training.spec import JobSpec
from resources.errors import ConfigError, DataError
from resources.object_store import ObjectStore
from resources.verdict import Judges, Verdict

ACCURACY_CHECK = "accuracy_threshold"
ONNX_TOLERANCE = 1e-3
"""Largest difference between ONNX and PyTorch logits, as a fraction of the largest logit (at least 1)."""
INT8_MARGIN = 0.003
"""How far the int8 model's test accuracy may be below the float model's: the standard error of an accuracy of 90 % on
10,000 images. Another draw of test images would change the accuracy as much."""
_REQUIRED = ("test_accuracy", "test_loss", "expected_calibration_error", "onnx_max_difference")


def judge(
    models: ObjectStore, digest: str, threshold: float | None, public_keys: str | None = None
) -> tuple[ModelManifest, Verdict]:
    """Read the model's manifest and metrics, verified by digest, and compare; the numbers include both sides.

    Equality passes. Without a threshold, it is CIFAR10_THRESHOLD if most classes of CIFAR-10 are among the model's;
    another model has to be better than always naming the most frequent class of the test images. Raises IntegrityError
    or ObjectNotFoundError when the stored model does not match the digest, or, if there are public keys, its signature;
    DataError when its metrics have no accuracy from 0 to 1.
    """
    package = models.at(digest)
    manifest = read_manifest(package, digest)
    if public_keys:
        verify_package(package, digest, public_keys)
    metrics = read_json(package, manifest, METRICS_FILE)
    accuracy = number(metrics, "test_accuracy")
    if not 0 <= accuracy <= 1:
        raise DataError(
            f"{package.uri(METRICS_FILE)}: test_accuracy is {accuracy!r}, expected a number from 0 to 1. "
            "The model cannot be judged: train it again."
        )
    if threshold is None and not manifest.has_cifar10_classes:
        threshold = default_threshold(manifest, metrics)
        passed = accuracy > threshold
        side = "is more" if passed else "is not more"
        what = f"{side} than the {threshold:.4f} of always naming the most frequent class"
    else:
        threshold = CIFAR10_THRESHOLD if threshold is None else threshold
        passed = accuracy >= threshold
        what = f"{'reaches' if passed else 'is below'} the threshold {threshold:.4f}"
    reason = f"Test accuracy {accuracy:.4f} of model {digest} {what}"
    return manifest, Verdict(passed, reason, {"test_accuracy": accuracy, "threshold": threshold})


def default_threshold(manifest: ModelManifest, metrics: Mapping[str, Any]) -> float:
    """CIFAR10_THRESHOLD for classes like CIFAR-10's, else the fraction of test images of the most frequent class."""
    if manifest.has_cifar10_classes:
        return CIFAR10_THRESHOLD
    try:
        counts = [sum(row) for row in metrics["confusion_matrix"]]
        return max(counts) / sum(counts)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise DataError(f"{METRICS_FILE} has no confusion matrix: train the model again.") from error


def judge_model(
    models: ObjectStore,
    digest: str,
    threshold: float | None,
    onnx_tolerance: float = ONNX_TOLERANCE,
    public_keys: str | None = None,
) -> Judges:
    """The blocking checks of a stored model."""
    metrics = cache(lambda: read_metrics(models, digest))
    return {
        ACCURACY_CHECK: lambda: judge(models, digest, threshold, public_keys)[1],
        "metrics_finite": lambda: metrics_finite(metrics()),
        "onnx_equals_torch": lambda: onnx_equals_torch(metrics(), onnx_tolerance),
    }


def metrics_finite(metrics: Mapping[str, Any]) -> Verdict:
    """Every number in the metrics is finite, and the required ones are present."""
    numbers = dict(_floats(metrics))
    missing = [name for name in _REQUIRED if not isinstance(metrics.get(name), int | float)]
    bad = [name for name, value in numbers.items() if not math.isfinite(value)]
    if not missing and not bad:
        return Verdict(True, f"All {len(numbers)} numbers are finite.")
    return Verdict(False, f"Not finite: {', '.join(bad) or 'none'}. Not a number: {', '.join(missing) or 'none'}.")


def _floats(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield name, value
    elif isinstance(value, Mapping | list):
        for key, part in value.items() if isinstance(value, Mapping) else enumerate(value, 1):
            yield from _floats(part, f"{name} {key}".lstrip())


def onnx_equals_torch(metrics: Mapping[str, Any], tolerance: float) -> Verdict:
    """The exported model's logits differ from the trained model's only by rounding."""
    difference = number(metrics, "onnx_max_difference")
    largest = number(metrics, "onnx_largest_logit") if "onnx_largest_logit" in metrics else 1.0
    allowed = tolerance * max(1.0, largest)
    text = f"Largest logit difference {difference:.2e}, allowed {allowed:.1e}."
    return Verdict(difference <= allowed, text, {"largest_difference": difference})


def choose_precision(models: ObjectStore, digest: str, wanted: WantedPrecision) -> tuple[ServedPrecision, str]:
    """The precision to serve a stored model in, and the reason. `auto` is int8 where that loses little accuracy.

    Raises ConfigError when int8 is required but the model has no int8 file, or loses too much with it.
    """
    if wanted == "float32":
        return "float32", "The setting requires float32."
    verdict = int8_as_accurate(models, digest)
    if verdict.passed or wanted == "auto":
        return "int8" if verdict.passed else "float32", verdict.reason
    raise ConfigError(f"The setting requires int8. {verdict.reason} Set SERVING_PRECISION to auto or float32.")


def int8_as_accurate(models: ObjectStore, digest: str) -> Verdict:
    """The int8 model is at most INT8_MARGIN less accurate than the float model on the whole test split."""
    if INT8_FILE not in read_manifest(models.at(digest), digest).files:
        return Verdict(False, f"Model {digest} has no {INT8_FILE}: it was trained by an earlier release.")
    metrics = read_metrics(models, digest)
    accuracy, own = number(metrics, "test_accuracy"), number(metrics, "int8_test_accuracy")
    agreement = number(metrics, "int8_agreement")
    text = (
        f"Test accuracy is {own:.4f} with int8 and {accuracy:.4f} with float32; a loss of {INT8_MARGIN} is allowed. "
        f"They predict the same class for {agreement:.2%} of the test images."
    )
    # rounded, because a loss of 30 in 10,000 images is exactly the margin only up to the last bit
    passed = round(accuracy - own, 9) <= INT8_MARGIN
    return Verdict(passed, text, {"int8_test_accuracy": own, "int8_agreement": agreement})


def read_metrics(models: ObjectStore, digest: str) -> dict[str, Any]:
    """A stored model's metrics, verified by digest."""
    package = models.at(digest)
    return read_json(package, read_manifest(package, digest), METRICS_FILE)


def number(metrics: Mapping[str, Any], name: str) -> float:
    """One number of the metrics. DataError where there is none."""
    value = metrics.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{METRICS_FILE} has {name} {value!r}, expected a number. Train the model again.")
    return float(value)


def check_made_by(spec: JobSpec, models: ObjectStore, model_digest: str) -> None:
    """DataError when the stored model has another dataset, recipe, seed or start than the job: it is not its result."""
    package = models.at(model_digest)
    manifest = read_manifest(package, model_digest)
    expected = {
        "dataset": spec.dataset_digest,
        "seed": spec.seed,
        "starting weights": spec.start and spec.start.sha256,
        "recipe": spec.recipe.model_dump(mode="json"),
    }
    recipe = read_json(package, manifest, RECIPE_FILE)
    found = {
        "dataset": manifest.dataset_digest,
        "seed": manifest.seed,
        "starting weights": manifest.start_weights,
        "recipe": recipe,
    }
    for what, value in expected.items():
        if found[what] != value:
            raise DataError(f"Model {model_digest} has {what} {found[what]}, this run asked for {value}.")
