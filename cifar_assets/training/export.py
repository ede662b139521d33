"""The trained network in the formats it is published in."""

import io
import warnings
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch.jit._trace import TracerWarning

from cifar_assets.contracts import IMAGE_SHAPE, MODEL_INPUT, MODEL_OUTPUT
from cifar_assets.model_package import RECIPE_FILE, WEIGHTS_FILE, ModelManifest, read_file
from cifar_assets.training.networks import Classifier, ResNet18, build_network
from cifar_assets.training.recipes import Recipe
from resources.errors import DataError
from resources.object_store import ObjectStore

_OPSET = 18
_TOLERANCE = 1e-3
"""Largest difference between ONNX Runtime and torch that is accepted, as a share of the largest logit."""


def weights_bytes(classifier: Classifier) -> bytes:
    """The classifier's tensors as safetensors. The same weights give the same bytes."""
    return save({name: value.cpu().contiguous() for name, value in classifier.state_dict().items()})


def seed_copy_bytes(classifier: Classifier) -> bytes:
    """The network's state dict as `torch.save` writes it: what readers of the old pipeline load.

    A ResNet's is torchvision's.
    """
    network = classifier.network
    tensors = network.torchvision_state_dict() if isinstance(network, ResNet18) else network.state_dict()
    buffer = io.BytesIO()
    torch.save({name: value.cpu().contiguous() for name, value in tensors.items()}, buffer)
    return buffer.getvalue()


def onnx_bytes(classifier: Classifier) -> bytes:
    """The classifier as ONNX: `images` uint8 (N, 3, 32, 32) to `logits` float32 (N, 10), for any N.

    The exporter by tracing is used: it takes a second where the one by torch.export takes fifteen, gives the same
    bytes for the same weights, and records no paths of the machine.
    """
    model = classifier.cpu().to(memory_format=torch.contiguous_format).eval()
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        # a map's size decides which taps are used, and is the same for every image
        warnings.simplefilter("ignore", TracerWarning)
        warnings.filterwarnings("ignore", "Constant folding", UserWarning)
        torch.onnx.export(
            model,
            (torch.zeros((2, *IMAGE_SHAPE), dtype=torch.uint8),),
            buffer,  # pyright: ignore[reportArgumentType] (typed for paths; the tracing exporter documents streams)
            dynamo=False,
            input_names=[MODEL_INPUT],
            output_names=[MODEL_OUTPUT],
            dynamic_axes={MODEL_INPUT: {0: "N"}, MODEL_OUTPUT: {0: "N"}},
            opset_version=_OPSET,
        )
    return buffer.getvalue()


def onnx_difference(onnx: bytes, images: NDArray[np.uint8], logits: NDArray[np.float32]) -> float:
    """Largest difference between what ONNX Runtime makes of the images and torch's logits.

    Raises DataError when it is more than rounding explains.
    """
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    found: Any = session.run([MODEL_OUTPUT], {MODEL_INPUT: images})[0]
    if not np.isfinite(found).all():
        raise DataError(
            f"The ONNX model's output is not finite on {len(images)} held-out images, where PyTorch's is: the exporter "
            "does not fit this network; check the versions of torch and onnxruntime."
        )
    difference = float(np.abs(found - logits).max())
    allowed = _TOLERANCE * max(1.0, float(np.abs(logits).max()))
    if not difference <= allowed:
        raise DataError(
            f"The ONNX model differs from torch by {difference} on {len(images)} held-out images, expected at most "
            f"{allowed}: the exporter does not fit this network; check the versions of torch and onnxruntime."
        )
    return difference


def load_classifier(package: ObjectStore, manifest: ModelManifest) -> Classifier:
    """The stored model as a torch module on the CPU, in evaluation mode; its files verified by digest."""
    recipe = Recipe.model_validate_json(read_file(package, manifest, RECIPE_FILE))
    tensors = load(read_file(package, manifest, WEIGHTS_FILE))
    mean, std = (tuple(tensors[name].flatten().tolist()) for name in ("mean", "std"))
    classifier = Classifier(build_network(recipe), mean, std, recipe.views)
    try:
        classifier.load_state_dict(tensors)
    except RuntimeError as error:
        raise DataError(f"{package.uri(WEIGHTS_FILE)} does not fit its recipe {recipe.name!r}: {error}") from error
    return classifier.eval()
