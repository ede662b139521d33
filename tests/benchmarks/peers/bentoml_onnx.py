"""BentoML with its adaptive batching, ONNX Runtime. Run by `bentoml serve bentoml_onnx:Classifier`."""

from pathlib import Path

import bentoml
import numpy as np
from model import OnnxModel, pixels


@bentoml.service(workers=1, traffic={"timeout": 60})
class Classifier:
    def __init__(self) -> None:
        self.model = OnnxModel()

    @bentoml.api(batchable=True, max_batch_size=32, max_latency_ms=1000)
    def predict(self, image: list[Path]) -> list[list[float]]:
        return self.model(np.stack([pixels(path.read_bytes()) for path in image])).tolist()
