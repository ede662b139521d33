"""What a canary has to answer on held-out images before it gets all requests."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cifar_assets.dataset.versions.reader import open_split
from cifar_assets.serving.comparison import find_canary_fault
from resources.inference_service.client import Predictions, ServerError
from resources.object_store import open_store
from tests.fixtures.models import store_model
from tests.fixtures.tiny_data import store_tiny_data


class Canary:
    """Answers every image with its label, as the model of one digest."""

    def __init__(self, labels: np.ndarray, digest: str):
        self.labels = labels
        self.digest = digest

    def predict_arrays(self, images: np.ndarray) -> Predictions:
        return Predictions(np.eye(10)[self.labels], self.digest, "1")


class Silent:
    def predict_arrays(self, images: np.ndarray) -> Predictions:
        raise ServerError("connection refused")


@pytest.mark.parametrize(
    ("accuracy", "canary", "fault"),
    [
        (1.0, "right", None),
        (0.3, "right", "100.0 % of 60 test images right; the stored model has 30.0 %"),
        (1.0, "of another model", "the canary's endpoint serves model ffff"),
        (1.0, "silent", "connection refused"),
    ],
)
def test_canary_has_to_answer_as_evaluated(tmp_path: Path, accuracy: float, canary: str, fault: str | None) -> None:
    root = open_store(tmp_path.as_uri())
    models, processed = root.at("models"), root.at("processed-data")
    data = store_tiny_data(root)
    digest = store_model(models, {"test_accuracy": accuracy}, dataset=data.processed)
    labels = open_split(processed, data.processed, "test").labels
    client: Any = Canary(labels, "f" * 64 if canary == "of another model" else digest)
    found = find_canary_fault(Silent() if canary == "silent" else client, models, processed, digest)  # pyright: ignore[reportArgumentType]
    assert (found is None) if fault is None else (found is not None and fault in found)
