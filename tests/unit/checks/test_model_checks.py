"""Verdicts on stored metrics of every kind, including some that no training writes."""

import json
from pathlib import Path
from typing import Any

import pytest

from cifar_assets.checks.model import calibrated, recall_reached
from cifar_assets.contracts import CLASSES
from cifar_assets.gate import judge_model, metrics_finite, onnx_equals_torch
from cifar_assets.model_package import PERFORMANCE_FILE
from resources.errors import DataError
from resources.object_store import FolderStore
from resources.verdict import objections
from tests.fixtures.cifar10 import INFERENCE_SERVICE, TRAINED_MODEL
from tests.fixtures.models import METRICS, store_model
from tests.fixtures.orchestration import World

WITHOUT_CATS = {"per_class_recall": {**dict.fromkeys(CLASSES, 0.8), "cat": None}}


def test_split_without_a_class_is_a_warning(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.known_data()
    result = world.materialize(TRAINED_MODEL, INFERENCE_SERVICE, metrics=WITHOUT_CATS)
    assert result.success
    found = {each.check_name: each for each in result.get_asset_check_evaluations()}
    assert "No test images of cat" in str(found["recall_floor"].description)
    assert not found["recall_floor"].passed
    assert [name for name, each in found.items() if not each.passed and each.blocking] == []
    assert world.deployed() == [world.newest(TRAINED_MODEL)]


@pytest.mark.parametrize("name", sorted(METRICS))
def test_metrics_that_lack_a_key_give_verdicts(tmp_path: Path, name: str) -> None:
    world = World(tmp_path)
    document = {key: value for key, value in METRICS.items() if key != name}
    stored = store_model(world.models, json.dumps(document).encode())
    result = world.materialize(TRAINED_MODEL, config={TRAINED_MODEL: {"model_digest": stored}})
    assert len(result.get_asset_check_evaluations()) == 7


@pytest.mark.parametrize("performance", [b"{", b"[]", b'{"images_per_second": null}', b'{"seconds_per_phase": {}}'])
def test_unusual_timings_do_not_fail_the_materialization(tmp_path: Path, performance: bytes) -> None:
    world = World(tmp_path)
    stored = store_model(world.models, {"history": [{}]}, files={PERFORMANCE_FILE: performance})
    world.materialize(TRAINED_MODEL, config={TRAINED_MODEL: {"model_digest": stored}})
    assert world.newest(TRAINED_MODEL) == stored


@pytest.mark.parametrize(
    ("recalls", "passed", "text"),
    [
        (dict.fromkeys(CLASSES, 0.4), True, "Lowest is airplane with 0.400"),
        ({**dict.fromkeys(CLASSES, 0.8), "dog": 0.1}, False, "Below 0.40: dog 0.100"),
        (dict.fromkeys(CLASSES), False, "No test images of airplane"),
        ({**dict.fromkeys(CLASSES, 0.8), "dog": float("nan")}, False, "dog nan"),
        ({}, False, "No test images of"),
    ],
    ids=["enough", "low", "no images", "nan", "missing"],
)
def test_recall(recalls: dict[str, float | None], passed: bool, text: str) -> None:
    found = recall_reached({"per_class_recall": recalls}, CLASSES, 0.4)
    assert found.passed is passed
    assert text in found.reason


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"test_loss": float("inf")}, "test_loss"),
        ({"history": [{"epoch": 1, "train_loss": float("nan")}]}, "history 1 train_loss"),
        ({"per_class_recall": {"cat": float("nan")}}, "per_class_recall cat"),
        ({"test_loss": None}, "test_loss"),
        ({"test_accuracy": "0.9"}, "test_accuracy"),
    ],
    ids=["infinite", "an epoch", "a class", "missing", "text"],
)
def test_numbers_that_are_not_finite_are_named(change: dict[str, Any], named: str) -> None:
    found = metrics_finite({**METRICS, **change})
    assert not found.passed
    assert named in found.reason


@pytest.mark.parametrize(
    ("difference", "largest", "passed"),
    [(1e-4, 1.0, True), (1e-2, 1.0, False), (1e-2, 20.0, True), (float("nan"), 1.0, False)],
)
def test_onnx_difference_is_allowed_in_proportion(difference: float, largest: float, passed: bool) -> None:
    metrics = {"onnx_max_difference": difference, "onnx_largest_logit": largest}
    assert onnx_equals_torch(metrics, 1e-3).passed is passed


def test_a_missing_number_is_named() -> None:
    with pytest.raises(DataError, match="expected_calibration_error None, expected a number"):
        calibrated({}, 0.1)


def test_blocking_verdicts_of_a_model_that_is_not_stored(tmp_path: Path) -> None:
    reasons = objections(judge_model(FolderStore(tmp_path), "f" * 64, 0.5))
    assert len(reasons) == 3
    assert all("f" * 64 in reason for reason in reasons)
