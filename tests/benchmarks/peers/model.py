"""What every peer does with a picture: decode it, run the model, give probabilities. MODEL names the model's folder."""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = Path(os.environ["MODEL"])
PORT = int(os.environ["PORT"])


def pixels(picture: bytes) -> np.ndarray:
    """uint8 (3, 32, 32) of an encoded picture."""
    image = Image.open(io.BytesIO(picture)).convert("RGB").resize((32, 32))
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


class OnnxModel:
    def __init__(self) -> None:
        import onnxruntime

        self.session = onnxruntime.InferenceSession(FOLDER / "model.onnx", providers=["CPUExecutionProvider"])

    def __call__(self, images: np.ndarray) -> np.ndarray:
        (logits,) = self.session.run(["logits"], {"images": images})
        return softmax(logits)


class TorchModel:
    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.network = torch.load(FOLDER / "model.pt", weights_only=False).eval()

    def __call__(self, images: np.ndarray) -> np.ndarray:
        with self.torch.inference_mode():
            return softmax(self.network(self.torch.from_numpy(images)).numpy())
