"""The one decision that lets a model be served: its stored test accuracy against the threshold in force now."""

from dataclasses import dataclass

from cifar_assets.errors import DataError
from cifar_assets.model_package import METRICS_FILE, ModelManifest, read_json, read_manifest
from cifar_assets.object_store import ObjectStore


@dataclass(frozen=True)
class Verdict:
    """Whether one exact model may be served, and the two numbers that say why."""

    model_digest: str
    test_accuracy: float
    threshold: float

    @property
    def passed(self) -> bool:
        return self.test_accuracy >= self.threshold

    @property
    def reason(self) -> str:
        relation = "reaches" if self.passed else "is below"
        return (
            f"test accuracy {self.test_accuracy:.4f} of model {self.model_digest} {relation} "
            f"the threshold {self.threshold:.4f}"
        )


def judge(models: ObjectStore, model_digest: str, threshold: float) -> tuple[ModelManifest, Verdict]:
    """Read the model's manifest and metrics, verified by digest, and decide.

    Equality passes. Raises IntegrityError or ObjectNotFoundError when the stored model is not the one the digest names,
    DataError when its metrics hold no accuracy in 0..1.
    """
    package = models.at(model_digest)
    manifest = read_manifest(package, model_digest)
    accuracy = read_json(package, manifest, METRICS_FILE).get("test_accuracy")
    if isinstance(accuracy, bool) or not isinstance(accuracy, int | float) or not 0 <= accuracy <= 1:
        raise DataError(
            f"{package.uri(METRICS_FILE)}: test_accuracy is {accuracy!r}, expected a number from 0 to 1. "
            "The model cannot be judged: train it again."
        )
    return manifest, Verdict(model_digest=model_digest, test_accuracy=float(accuracy), threshold=threshold)
