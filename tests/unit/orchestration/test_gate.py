"""The gate's decision."""

import pytest

from cifar_assets.deployment import resources_for
from cifar_assets.gate import judge
from cifar_assets.model_package import METRICS_FILE
from resources.errors import DataError, ExplainedError, IntegrityError
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


def test_the_threshold_comes_from_the_environment_or_its_default() -> None:
    assert resources_for(settings_of({"ACCURACY_THRESHOLD": "0.5"}))["gate"].threshold == 0.5
    assert resources_for(settings_of({}))["gate"].threshold == 0.85
