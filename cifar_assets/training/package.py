"""The model package: the trained network in all published formats, and its metrics and records."""

import copy
import io
import json
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import nn
from torch.jit._trace import TracerWarning

from cifar_assets.contracts import MODEL_INPUT, MODEL_OUTPUT, ImageSpec
from cifar_assets.gate import ONNX_TOLERANCE
from cifar_assets.model_package import (
    CARD_FILE,
    ENVIRONMENT_FILE,
    IDENTITY_FILES,
    INT8_FILE,
    METRICS_FILE,
    ONNX_FILE,
    PERFORMANCE_FILE,
    RECIPE_FILE,
    SBOM_FILE,
    WEIGHTS_FILE,
    ModelManifest,
)
from cifar_assets.training.data import TensorSplit, batch_images
from cifar_assets.training.device import Processor, describe_environment
from cifar_assets.training.loop import DivergedError, Trainer
from cifar_assets.training.networks import PublishedNetwork, ResNet18, SpeedNetStage
from cifar_assets.training.quantize import int8_bytes, open_session
from cifar_assets.training.sbom import build_sbom
from cifar_assets.training.spec import JobSpec
from resources.digests import canonical_json, sha256_bytes
from resources.errors import DataError

_OPSET = 20
"""The first with `Gelu`, which ONNX Runtime does not recognize in its parts between quantized layers."""
_ONNX_IMAGES = 256
_ONNX_BATCH = 64
"""Takes 3 % more time than batches of 500, and less memory."""
_CALIBRATION_BINS = 15
_REPEATABLE = {"epoch", "train_loss", "validation_loss", "validation_accuracy", "learning_rate", "resolution"}


def build_package(trainer: Trainer, network: PublishedNetwork) -> tuple[ModelManifest, dict[str, bytes]]:
    """The model's manifest and the files of its package, except for the log."""
    spec, data = trainer.spec, trainer.data
    classes = data.manifest.classes
    with trainer.timed("test"):
        test_logits = predict(network, data.test, trainer.processor)
        test = measure(test_logits, data.test.labels.cpu().numpy(), classes)
        logits = predict(network, data.validation, trainer.processor)
        validation = measure(logits, data.validation.labels.cpu().numpy(), classes)
    with trainer.timed("export"):
        most = min(_ONNX_IMAGES, max(64, batch_images(data.manifest.image_size)))
        images = data.validation.images(np.arange(min(most, len(data.validation))))
        with torch.inference_mode():
            logits = network(images).cpu().numpy()
        weights, onnx = weights_bytes(network), onnx_bytes(network, data.manifest.image_size)
        difference = onnx_difference(onnx, images.cpu().numpy(), logits)
    with trainer.timed("quantize"):
        int8 = int8_bytes(onnx, images.cpu().numpy(), torch.get_num_threads())
        agreement = compare_int8(int8, data.test, test_logits)
    # nothing that differs between two runs of one job, such as times or the host
    metrics = {
        **{f"test_{name}": test[name] for name in ("accuracy", "loss", "images")},
        **{f"validation_{name}": validation[name] for name in ("accuracy", "loss", "images")},
        **{name: test[name] for name in ("per_class_recall", "confusion_matrix", "expected_calibration_error")},
        "views": spec.recipe.views,
        "history": [record.model_dump(include=_REPEATABLE) for record in trainer.state.position.history],
        "dataset_digest": spec.dataset_digest,
        "raw_digest": data.manifest.raw_digest,
        "seed": spec.seed,
        "train_images": len(data.train),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "onnx_max_difference": difference,
        "onnx_largest_logit": float(np.abs(logits).max()),
        "onnx_images": len(images),
        **agreement,
    }
    environment = describe_environment(trainer.processor, trainer.processes.world_size)
    files = {
        WEIGHTS_FILE: weights,
        ONNX_FILE: onnx,
        INT8_FILE: int8,
        METRICS_FILE: canonical_json(metrics),
        RECIPE_FILE: canonical_json(spec.recipe.model_dump(mode="json")),
        PERFORMANCE_FILE: readable_json(_performance(trainer)),
        ENVIRONMENT_FILE: readable_json(environment),
        CARD_FILE: _model_card(spec, data.manifest, metrics).encode(),
    }
    manifest = ModelManifest(
        dataset_digest=spec.dataset_digest,
        raw_digest=data.manifest.raw_digest,
        seed=spec.seed,
        **dict(data.manifest.spec),
        start_weights=spec.start.sha256 if spec.start else None,
        start_model=spec.start.model_digest if spec.start else None,
        files={name: sha256_bytes(files[name]) for name in IDENTITY_FILES},
    )
    files[SBOM_FILE] = readable_json(build_sbom(spec.data_set, manifest.digest))
    return manifest, files


def predict(classifier: nn.Module, split: TensorSplit, processor: Processor) -> NDArray[np.float32]:
    """Logits (N, number of classes) of a classifier that takes uint8 images. Raises DivergedError for NaN."""
    parts = []
    batch = batch_images(split.image_size)
    for start in range(0, len(split), batch):
        indices = np.arange(start, min(start + batch, len(split)))
        with torch.inference_mode(), processor.autocast():
            parts.append(classifier(split.images(indices)).float().cpu().numpy())
    logits = np.concatenate(parts)
    if not np.isfinite(logits).all():
        raise DivergedError("the output of the network", f"for some of {len(split)} images")
    return logits


def compare_int8(int8: bytes, split: TensorSplit, logits: NDArray[np.float32]) -> dict[str, float]:
    """Metrics of the int8 model on a split: accuracy, and agreement with the predictions that the logits give."""
    batches = np.array_split(np.arange(len(split)), -(-len(split) // _onnx_batch(split.image_size)))
    found = _onnx_logits(int8, (split.images(batch).cpu().numpy() for batch in batches))
    predicted, labels = found.argmax(axis=1), split.labels.cpu().numpy()
    accuracy, float_accuracy = ((each == labels).mean() for each in (predicted, logits.argmax(axis=1)))
    return {
        "int8_test_accuracy": float(accuracy),
        "int8_accuracy_difference": float(accuracy - float_accuracy),
        "int8_agreement": float((predicted == logits.argmax(axis=1)).mean()),
    }


def measure(logits: NDArray[np.float32], labels: NDArray[np.int64], classes: Sequence[str]) -> dict[str, Any]:
    """Metrics of one split: accuracy, loss, recall per class, confusion matrix, calibration error.

    The confusion matrix has true classes as rows and predicted ones as columns. A class without images has no recall.
    """
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    predicted = logits.argmax(axis=1)
    confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    return {
        "accuracy": float((predicted == labels).mean()),
        "loss": float(-log_probabilities[np.arange(len(labels)), labels].mean()),
        "images": len(labels),
        "per_class_recall": {
            name: float(right / total) if total else None
            for name, right, total in zip(classes, confusion.diagonal(), confusion.sum(axis=1), strict=True)
        },
        "confusion_matrix": confusion.tolist(),
        "expected_calibration_error": calibration_error(np.exp(log_probabilities), labels),
    }


def calibration_error(probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Expected calibration error over 15 equal bins of confidence (Guo et al., arXiv:1706.04599)."""
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    bins = np.minimum((confidence * _CALIBRATION_BINS).astype(int), _CALIBRATION_BINS - 1)
    gaps = np.bincount(bins, weights=right - confidence, minlength=_CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(labels))


def readable_json(value: dict[str, Any]) -> bytes:
    """Human-readable JSON."""
    return json.dumps(value, indent=2, sort_keys=True).encode()


def weights_bytes(network: PublishedNetwork) -> bytes:
    """The network's tensors as safetensors. The same weights give the same bytes."""
    return save({name: value.cpu().contiguous() for name, value in network.state_dict().items()})


def baseline_copy_bytes(network: PublishedNetwork) -> bytes:
    """The network's state dict from `torch.save`, for readers of the old pipeline.

    A ResNet's has torchvision's parameter names.
    """
    inner = network.network
    tensors = inner.torchvision_state_dict() if isinstance(inner, ResNet18) else inner.state_dict()
    buffer = io.BytesIO()
    torch.save({name: value.cpu().contiguous() for name, value in tensors.items()}, buffer)
    return buffer.getvalue()


def onnx_bytes(network: PublishedNetwork, image_size: int) -> bytes:
    """The network as ONNX: `images` uint8 (N, 3, size, size) to `logits` float32 (N, number of classes), for any N.

    The tracing exporter takes one second instead of the fifteen of torch.export, gives the same bytes for the same
    weights, and records no local paths.
    """
    model = copy.deepcopy(network).cpu().to(memory_format=torch.contiguous_format).eval()
    for module in list(model.modules()):
        if isinstance(module, SpeedNetStage):
            module.fold_first_norm()  # the exporter itself folds norms that follow a convolution
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        # whether a feature map is padded depends on its size, which is the same for every image
        warnings.simplefilter("ignore", TracerWarning)
        warnings.filterwarnings("ignore", "Constant folding", UserWarning)
        torch.onnx.export(
            model,
            (torch.zeros((2, 3, image_size, image_size), dtype=torch.uint8),),
            buffer,  # pyright: ignore[reportArgumentType] (typed for paths; the tracing exporter documents streams)
            dynamo=False,
            input_names=[MODEL_INPUT],
            output_names=[MODEL_OUTPUT],
            dynamic_axes={MODEL_INPUT: {0: "N"}, MODEL_OUTPUT: {0: "N"}},
            opset_version=_OPSET,
        )
    return buffer.getvalue()


def onnx_difference(onnx: bytes, images: NDArray[np.uint8], logits: NDArray[np.float32]) -> float:
    """Largest difference between the logits of ONNX Runtime and torch.

    Raises DataError if it is larger than rounding explains.
    """
    found = _onnx_logits(onnx, np.array_split(images, -(-len(images) // _onnx_batch(images.shape[-1]))))
    difference = float(np.abs(found - logits).max())
    allowed = ONNX_TOLERANCE * max(1.0, float(np.abs(logits).max()))
    if not difference <= allowed:  # or if the output is not finite
        raise DataError(
            f"The ONNX model differs from torch by {difference} on {len(images)} held-out images, expected at most "
            f"{allowed}: the exporter does not support this network; check the versions of torch and onnxruntime."
        )
    return difference


def _onnx_batch(image_size: int) -> int:
    return min(_ONNX_BATCH, batch_images(image_size))


def _onnx_logits(model: bytes, batches: Iterable[NDArray[np.uint8]]) -> NDArray[np.float32]:
    session = open_session(model, torch.get_num_threads())
    found: Any = [session.run([MODEL_OUTPUT], {MODEL_INPUT: batch})[0] for batch in batches]
    return np.concatenate(found)


def _performance(trainer: Trainer) -> dict[str, Any]:
    """Speed and time. Training seconds cover all epochs, even if the run was continued in another process."""
    history, num_train = trainer.state.position.history, len(trainer.data.train)
    train_seconds = sum(record.seconds for record in history)
    return {
        "images_per_second": num_train * len(history) / train_seconds if train_seconds else None,
        "train_seconds": train_seconds,
        "seconds_per_phase": {name: round(seconds, 3) for name, seconds in trainer.seconds.items()},
        "resumed_from_step": trainer.resumed_from,
        "mlflow_unsent": [],
    }


def _model_card(spec: JobSpec, images: ImageSpec, metrics: dict[str, Any]) -> str:
    views = " (mean over each image and its mirror image)" if spec.recipe.views == "mirrored" else ""
    rows = {
        f"test accuracy{views}": f"{_percent(metrics['test_accuracy'])} of {metrics['test_images']} images",
        "test accuracy of the int8 model": _percent(metrics["int8_test_accuracy"]),
        "validation accuracy": f"{_percent(metrics['validation_accuracy'])} of {metrics['validation_images']} images",
        "expected calibration error": f"{metrics['expected_calibration_error']:.4f}",
        **{f"recall of {name}": _percent(recall) for name, recall in metrics["per_class_recall"].items()},
        "parameters": f"{metrics['parameters']:,}",
        "training images": f"{metrics['train_images']:,}",
        "processed dataset": f"`{metrics['dataset_digest']}`",
        "raw dataset": f"`{metrics['raw_digest']}`",
        **({"started from": f"`{spec.start.uri}`"} if spec.start else {}),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    what = f"{images.image_size}x{images.image_size} color images into {len(images.classes)} classes"
    title = "CIFAR-10 classifier" if images.is_cifar10 else f"Classifier of the data set `{spec.data_set}`"
    return f"""# {title}, recipe `{spec.recipe.name}`

Classifies {what}. It always answers with one of them, whatever the image shows.
This is one training with seed {spec.seed}; other seeds give somewhat different results. The test split was used once,
after training. The complete recipe is in `recipe.json`, the environment in `environment.json`, its packages
in `sbom.cdx.json`.

| measure | value |
|---|---|
{table}
"""


def _percent(value: float | None) -> str:
    return "no images" if value is None else f"{100 * value:.2f} %"
