"""Measuring a network on a split."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from cifar_assets.contracts import CLASSES
from cifar_assets.training.data import TensorSplit
from cifar_assets.training.device import Processor
from cifar_assets.training.distributed import Processes
from cifar_assets.training.stopping import DivergedError

_BATCH = 500
_CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Score:
    """Mean cross-entropy in nats and fraction of right answers on a split."""

    loss: float
    accuracy: float


def score(
    classify: Callable[[Tensor], Tensor], split: TensorSplit, processor: Processor, processes: Processes
) -> Score:
    """Loss and accuracy of a function from uint8 images to logits.

    Each process measures its part; over all of them every image counts once.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=processor.device)
    for start in range(0, len(split), _BATCH * processes.world_size):
        indices = processes.part_of(np.arange(start, min(start + _BATCH * processes.world_size, len(split))))
        if not len(indices):
            continue
        labels = split.labels_at(indices)
        with torch.inference_mode(), processor.autocast():
            logits = classify(split.images(indices)).float()
        sums[0] += functional.cross_entropy(logits, labels, reduction="sum")
        sums[1] += (logits.argmax(1) == labels).sum()
    loss, accuracy = (processes.all_reduce(sums) / len(split)).tolist()
    return Score(loss, accuracy)


def predict(classifier: nn.Module, split: TensorSplit, processor: Processor) -> NDArray[np.float32]:
    """Logits (N, 10) of a classifier that takes uint8 images. Raises DivergedError for NaN."""
    parts = []
    for start in range(0, len(split), _BATCH):
        indices = np.arange(start, min(start + _BATCH, len(split)))
        with torch.inference_mode(), processor.autocast():
            parts.append(classifier(split.images(indices)).float().cpu().numpy())
    logits = np.concatenate(parts)
    if not np.isfinite(logits).all():
        raise DivergedError("the output of the network", f"for some of {len(split)} images")
    return logits


def measure(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> dict[str, Any]:
    """Metrics of one split: accuracy, loss, recall per class, confusion matrix, calibration error.

    The confusion matrix has the true class by row, the predicted one by column. A class without images has no recall.
    """
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    predicted = logits.argmax(axis=1)
    confusion = np.zeros((len(CLASSES), len(CLASSES)), dtype=np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    totals = confusion.sum(axis=1)
    return {
        "accuracy": float((predicted == labels).mean()),
        "loss": float(-log_probabilities[np.arange(len(labels)), labels].mean()),
        "images": len(labels),
        "per_class_recall": {
            name: float(confusion[index, index] / totals[index]) if totals[index] else None
            for index, name in enumerate(CLASSES)
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
