"""The gate's decision."""

import pytest

from cifar_assets.contracts import CLASSES
from cifar_assets.deployment import resources_for
from cifar_assets.gate import choose_precision, judge
from cifar_assets.model_package import INT8_FILE, METRICS_FILE
from resources.errors import ConfigError, DataError, ExplainedError, IntegrityError
from resources.object_store import ObjectStore, open_store
from tests.fixtures.models import store_model
from tests.fixtures.settings import settings_of


@pytest.fixture
def models(tmp_path) -> ObjectStore:
    return open_store((tmp_path / "models").as_uri())


@pytest.mark.parametrize(("accuracy", "passed"), [(0.31, False), (0.7999, False), (0.8, True), (0.93, True)])
def test_a_model_passes_from_the_threshold_on(models: ObjectStore, accuracy: float, passed: bool) -> None:
    _, verdict = judge(models, store_model(models, {"test_accuracy": accuracy}), 0.8)
    assert verdict.passed is passed
    assert f"{accuracy:.4f}" in verdict.reason
    assert "0.8000" in verdict.reason


def test_edited_metrics_are_detected(models: ObjectStore) -> None:
    digest = store_model(models, {"test_accuracy": 0.31})
    models.write(f"{digest}/{METRICS_FILE}", b'{"test_accuracy": 0.99}')
    with pytest.raises(IntegrityError, match=METRICS_FILE):
        judge(models, digest, 0.8)


@pytest.mark.parametrize("accuracy", [None, "0.9", 77.11, -0.1, True])
def test_accuracy_that_is_not_a_fraction_is_refused(models: ObjectStore, accuracy: object) -> None:
    digest = store_model(models, {"test_accuracy": accuracy})
    with pytest.raises(DataError, match="test_accuracy"):
        judge(models, digest, 0.8)


def test_a_model_that_is_not_stored_cannot_pass(models: ObjectStore) -> None:
    with pytest.raises(ExplainedError, match="f" * 64):
        judge(models, "f" * 64, 0.0)


@pytest.mark.parametrize(("accuracy", "passed"), [(0.8001, True), (0.797, True), (0.7969, False), (0.1, False)])
def test_int8_may_lose_up_to_the_margin(models: ObjectStore, accuracy: float, passed: bool) -> None:
    digest = store_model(models, {"test_accuracy": 0.8, "int8_test_accuracy": accuracy}, covered={INT8_FILE: b"int8"})
    precision, reason = choose_precision(models, digest, "auto")
    assert precision == ("int8" if passed else "float32")
    assert f"{accuracy:.4f} with int8 and 0.8000 with float32" in reason
    assert "98.00%" in reason
    assert choose_precision(models, digest, "float32") == ("float32", "The setting requires float32.")
    if passed:
        assert choose_precision(models, digest, "int8") == (precision, reason)
    else:
        with pytest.raises(ConfigError, match="requires int8"):
            choose_precision(models, digest, "int8")


def test_a_model_without_an_int8_file_is_served_as_float(models: ObjectStore) -> None:
    digest = store_model(models)
    precision, reason = choose_precision(models, digest, "auto")
    assert precision == "float32"
    assert f"has no {INT8_FILE}" in reason
    with pytest.raises(ConfigError, match=f"has no {INT8_FILE}"):
        choose_precision(models, digest, "int8")


def test_the_threshold_comes_from_the_environment() -> None:
    assert resources_for(settings_of({"ACCURACY_THRESHOLD": "0.5"}))["gate"].threshold == 0.5
    assert resources_for(settings_of({}))["gate"].threshold is None


@pytest.mark.parametrize(("accuracy", "passed"), [(0.8499, False), (0.85, True)])
def test_the_default_threshold_of_cifar10(models: ObjectStore, accuracy: float, passed: bool) -> None:
    _, verdict = judge(models, store_model(models, {"test_accuracy": accuracy}), None)
    assert (verdict.passed, verdict.numbers["threshold"]) == (passed, 0.85)


@pytest.mark.parametrize(
    "classes", [CLASSES[:9], CLASSES[4:], (*CLASSES, "unknown"), tuple(name.title() for name in CLASSES)]
)
def test_the_default_threshold_does_not_drop_with_a_class(models: ObjectStore, classes: tuple[str, ...]) -> None:
    _, verdict = judge(models, store_model(models, {"test_accuracy": 0.84}, classes=classes), None)
    assert (verdict.passed, verdict.numbers["threshold"]) == (False, 0.85)


@pytest.mark.parametrize(("accuracy", "passed"), [(0.2, False), (0.5, False), (0.51, True)])
def test_a_model_of_other_classes_has_to_be_better_than_guessing(
    models: ObjectStore, accuracy: float, passed: bool
) -> None:
    metrics = {"test_accuracy": accuracy, "confusion_matrix": [[3, 3, 0], [0, 3, 0], [0, 1, 2]]}
    _, verdict = judge(models, store_model(models, metrics, classes=("cat", "dog", "horse")), None)
    assert (verdict.passed, verdict.numbers["threshold"]) == (passed, 0.5)
    assert "always naming the most frequent class" in verdict.reason
    assert judge(models, store_model(models, metrics, classes=("cat", "dog", "horse")), 0.1)[1].passed


def test_without_a_confusion_matrix_there_is_no_default_threshold(models: ObjectStore) -> None:
    digest = store_model(models, {"confusion_matrix": None}, classes=("cat", "dog"))
    with pytest.raises(DataError, match="no confusion matrix"):
        judge(models, digest, None)


def test_the_precision_comes_from_the_environment_or_is_chosen() -> None:
    assert resources_for(settings_of({"SERVING_PRECISION": "float32"}))["gate"].precision == "float32"
    assert resources_for(settings_of({}))["gate"].precision == "auto"
