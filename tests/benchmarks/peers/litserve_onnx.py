"""LitServe with its batching, ONNX Runtime."""

import litserve
import numpy as np
from fastapi import Request
from model import PORT, OnnxModel, pixels


class Classifier(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.model = OnnxModel()

    def decode_request(self, request: Request) -> np.ndarray:
        return pixels(request["image"].file.read())

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        return np.stack(inputs)

    def predict(self, images: np.ndarray) -> np.ndarray:
        return self.model(images)

    def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
        return list(output)

    def encode_response(self, output: np.ndarray) -> dict[str, list[list[float]]]:
        return {"predictions": [output.tolist()]}


if __name__ == "__main__":
    api = Classifier(max_batch_size=32, batch_timeout=0.001)
    litserve.LitServer(api, accelerator="cpu").run(
        host="127.0.0.1", port=PORT, log_level="warning", generate_client_file=False
    )
