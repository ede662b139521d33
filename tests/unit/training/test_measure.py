import numpy as np
import pytest
import torch

from cifar_assets.contracts import CLASSES
from cifar_assets.training.data import resize
from cifar_assets.training.package import calibration_error, measure


def test_measures_of_a_small_case_by_hand() -> None:
    labels = np.array([0, 0, 1, 2])
    logits = np.full((4, 10), -20.0, dtype=np.float32)
    for row, predicted in enumerate([0, 1, 1, 2]):
        logits[row, predicted] = 20.0
    found = measure(logits, labels, CLASSES)
    assert found["accuracy"] == 0.75
    assert found["images"] == 4
    assert found["loss"] == pytest.approx(40 / 4)
    recall = found["per_class_recall"]
    assert [recall[name] for name in CLASSES[:4]] == [0.5, 1.0, 1.0, None]
    confusion = np.array(found["confusion_matrix"])
    assert confusion.sum() == 4
    assert (confusion[0, 0], confusion[0, 1], confusion[1, 1], confusion[2, 2]) == (1, 1, 1, 1)
    assert found["expected_calibration_error"] == pytest.approx(0.25)


def test_calibration_error_of_calibrated_and_overconfident_probabilities() -> None:
    honest = np.tile([0.8, 0.2], (10, 1))
    labels = np.array([0] * 8 + [1] * 2)
    assert calibration_error(honest, labels) == pytest.approx(0.0)
    assert calibration_error(np.tile([1.0, 0.0], (10, 1)), labels) == pytest.approx(0.2)


@pytest.mark.parametrize("size", [16, 24, 31])
def test_resizing_keeps_flat_pictures_flat(size: int) -> None:
    picture = torch.arange(3.0).view(1, 3, 1, 1).expand(2, 3, 32, 32)
    resized = resize(picture, size)
    assert resized.shape == (2, 3, size, size)
    assert torch.allclose(resized, picture[..., :size, :size], atol=1e-5)


def test_full_size_is_left_alone() -> None:
    picture = torch.randn(1, 3, 32, 32)
    assert resize(picture, 32) is picture
