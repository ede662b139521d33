"""mosec with its batching, ONNX Runtime. The body is the picture."""

import sys

import numpy as np
from model import PORT, OnnxModel, pixels
from mosec import Server, Worker

sys.argv += ["--address", "127.0.0.1", "--port", str(PORT), "--log-level", "warning"]


class Classifier(Worker):
    def __init__(self) -> None:
        super().__init__()
        self.model = OnnxModel()

    def deserialize(self, data: bytes) -> np.ndarray:
        return pixels(data)

    def forward(self, data: list[np.ndarray]) -> list[dict]:
        return [{"predictions": [row]} for row in self.model(np.stack(data)).tolist()]


if __name__ == "__main__":
    server = Server()
    server.append_worker(Classifier, num=1, max_batch_size=32, max_wait_time=1)
    server.run()
