"""What the asset and its check say of recorded traffic; with a real server in tests/local/test_monitoring.py."""

from pathlib import Path

import dagster as dg
import numpy as np
import pytest

from cifar_assets.checks import drift
from cifar_assets.contracts import CIFAR10
from cifar_assets.traffic.drift import Sample
from cifar_assets.traffic.records import Answered, BatchInfo, write_batch
from cifar_assets.traffic.statistics import image_statistics
from resources.inference_service import ServiceStatus
from resources.object_store.resource import LocalObjectStore
from tests.fixtures.cifar10 import served_traffic_asset as served_traffic
from tests.fixtures.cifar10 import served_traffic_checks
from tests.fixtures.orchestration import NotingService

SERVED, EARLIER = "a" * 64, "b" * 64


class Status(NotingService):
    """Says which model answers."""

    def status(self) -> ServiceStatus:
        return ServiceStatus(True, "http://127.0.0.1:1", SERVED, "1", None)


class World:
    """Recorded traffic, and what Dagster makes of it."""

    def __init__(self, folder: Path):
        self.store = LocalObjectStore(path=str(folder))
        self.random = np.random.default_rng(0)

    def images(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        base = self.random.integers(60, 196, (number, 1, 1, 1))
        images = np.clip(base + self.random.integers(-60, 60, (number, 3, 32, 32)), 0, 255).astype(np.uint8)
        return images, self.random.dirichlet(np.full(10, 0.1), number)

    def record(self, number: int, model: str = SERVED, scale: int = 1, *, keep_pixels: bool = True) -> None:
        images, probabilities = self.images(number)
        answers = [Answered("id", 1e9, 0.02, images // scale, probabilities)]
        info = BatchInfo(
            model_digest=model, model_version="1", images=CIFAR10, responses={"200": 1, "400": 2, "500": 1}
        )
        write_batch(self.store.traffic, answers, info, keep_pixels=keep_pixels)

    def watch(self) -> tuple[dict[str, dg.MetadataValue], dg.AssetCheckEvaluation]:
        resources = {"object_store": self.store, "serving": Status(path="unused")}
        done = dg.materialize([served_traffic, served_traffic_checks], resources=resources)
        (made,) = done.asset_materializations_for_node(served_traffic.node_def.name)
        (evaluation,) = done.get_asset_check_evaluations()
        return dict(made.metadata), evaluation


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(tmp_path)

    def reference(*_: object) -> Sample:
        images, probabilities = world.images(1000)
        return Sample(probabilities, image_statistics(images))

    monkeypatch.setattr(drift, "_reference", reference)
    return world


def test_nothing_recorded_is_not_drift(world: World) -> None:
    metadata, evaluation = world.watch()
    assert metadata["num_requests"].value == 0
    assert (evaluation.passed, evaluation.description) == (True, "Not tested: nothing was recorded.")


def test_only_traffic_of_the_served_model_is_tested(world: World) -> None:
    world.record(300, EARLIER, scale=3)
    metadata, evaluation = world.watch()
    assert evaluation.passed
    assert "nothing was recorded of the served model" in str(evaluation.description)
    assert metadata["dagster/row_count"].value == 300


def test_usual_traffic_passes_and_is_described(world: World) -> None:
    world.record(300)
    metadata, evaluation = world.watch()
    assert evaluation.passed
    assert "No drift in 300 images" in str(evaluation.description)
    counts = {name: metadata[name].value for name in ("num_requests", "num_refused", "num_failed")}
    assert counts == {"num_requests": 4, "num_refused": 2, "num_failed": 1}
    assert metadata["latency_p99_milliseconds"].value == 20
    for name in ("plots", "least_certain"):
        assert "data:image/png" in str(metadata[name].value)


@pytest.mark.parametrize("keep_pixels", [True, False])
def test_drift_is_a_warning_in_words_with_pictures(world: World, keep_pixels: bool) -> None:
    world.record(300, scale=2, keep_pixels=keep_pixels)
    _, evaluation = world.watch()
    assert not evaluation.passed
    assert evaluation.severity == dg.AssetCheckSeverity.WARN
    assert "Pictures are darker (brightness 0.2" in str(evaluation.description)
    assert "data:image/png" in str(evaluation.metadata["pictures"].value)


def test_a_picture_sent_again_and_again_is_not_a_sample(world: World) -> None:
    images, probabilities = world.images(1)
    answers = [Answered("id", 1e9, 0.02, images, probabilities)] * 300
    info = BatchInfo(model_digest=SERVED, model_version="1", images=CIFAR10, responses={"200": 300})
    write_batch(world.store.traffic, answers, info, keep_pixels=True)
    _, evaluation = world.watch()
    assert evaluation.passed
    assert "Not tested: 1 distinct images" in str(evaluation.description)
