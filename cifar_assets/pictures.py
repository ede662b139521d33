"""Pictures for asset metadata: training curves and the confusion matrix, as PNG."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 80


def training_curves(history: Sequence[Mapping[str, float]]) -> bytes:
    """Loss and accuracy over epochs, from the per-epoch entries of metrics.json."""
    figure = _figure(8, 3)
    loss, accuracy = figure.subplots(1, 2)
    epochs = [entry["epoch"] for entry in history]
    for name in ("train_loss", "validation_loss"):
        loss.plot(epochs, [entry[name] for entry in history], marker="o", label=name.replace("_", " "))
    accuracy.plot(epochs, [entry["validation_accuracy"] for entry in history], marker="o", label="validation accuracy")
    for axes in (loss, accuracy):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.legend()
    return _png(figure)


def confusion_matrix(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> bytes:
    """Rows are true classes, columns predicted ones; shades are shares of a row, numbers are images."""
    matrix = np.asarray(counts)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    figure = _figure(6, 5.4)
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    for row, column in np.ndindex(matrix.shape):
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(matrix[row, column]), ha="center", va="center", fontsize=7, color=color)
    return _png(figure)


def as_markdown(png: bytes, title: str) -> str:
    """The picture inside Markdown, so that the Dagster UI shows it without a file server."""
    return f"![{title}](data:image/png;base64,{base64.b64encode(png).decode()})"


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
