"""Checks on held-out images whether a service is as accurate as its stored model."""

from dataclasses import dataclass

import numpy as np

from cifar_assets.dataset.versions.reader import open_split
from cifar_assets.gate import number
from cifar_assets.model_package import METRICS_FILE, read_json, read_manifest
from resources.inference_service.client import InferenceClient, ServerError
from resources.object_store import ObjectStore

_ALLOWED_ERRORS = 4.0
"""In standard errors of a sample: a correct service fails less than once in ten thousand times."""


@dataclass(frozen=True)
class Comparison:
    """The fraction of images classified correctly, and the expected one."""

    model_digest: str
    """Digest of the model that answered."""
    accuracy: float
    expected: float
    allowed: float
    """Allowed difference for a sample of this size."""
    num_images: int

    @property
    def passed(self) -> bool:
        return abs(self.accuracy - self.expected) <= self.allowed

    def __str__(self) -> str:
        return (
            f"{100 * self.accuracy:.1f} % of {self.num_images} test images right; the stored model has "
            f"{100 * self.expected:.1f} %, and a difference of {100 * self.allowed:.1f} percentage points is allowed "
            "for a sample of this size."
        )


def compare_answers(
    client: InferenceClient, models: ObjectStore, processed: ObjectStore, digest: str, num_images: int
) -> Comparison:
    """Send up to this many test images of the model's dataset. ServerError when the service does not respond."""
    package = models.at(digest)
    manifest = read_manifest(package, digest)
    expected = number(read_json(package, manifest, METRICS_FILE), "test_accuracy")
    test = open_split(processed, manifest.dataset_digest, "test")
    indices = test.spread(num_images)
    answers = client.predict_arrays(test.take(indices))
    return Comparison(
        model_digest=answers.model_digest,
        accuracy=float(np.mean(answers.labels == test.labels[indices])),
        expected=expected,
        allowed=_ALLOWED_ERRORS * float(np.sqrt(max(expected * (1 - expected), 0.01) / len(indices))),
        num_images=len(indices),
    )


def find_canary_fault(
    canary: InferenceClient, models: ObjectStore, processed: ObjectStore, digest: str, num_images: int = 256
) -> str | None:
    """Why the model's canary must not get all requests; None when it is as accurate as the stored model."""
    try:
        found = compare_answers(canary, models, processed, digest, num_images)
    except ServerError as error:
        return str(error)
    if found.model_digest != digest:
        return f"the canary's endpoint serves model {found.model_digest}"
    return None if found.passed else str(found)
