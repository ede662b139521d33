"""A trained model answers what a served model was sent; with a real server in tests/local/test_monitoring.py."""

from pathlib import Path

import numpy as np
import pytest
from Crypto.PublicKey import ECC

from cifar_assets.checks.shadow import ShadowConfig, judge_shadow
from cifar_assets.contracts import CIFAR10, ImageSpec
from cifar_assets.traffic.records import Answered, BatchInfo, write_batch
from resources.errors import IntegrityError
from resources.object_store.resource import LocalObjectStore
from tests.unit.serving.tiny_model import store_tiny_model, tiny_logits

SERVED = "a" * 64


class World:
    """A trained model, and recorded traffic of a served one."""

    def __init__(self, folder: Path):
        self.store = LocalObjectStore(path=str(folder))
        self.candidate = store_tiny_model(self.store.models, seed=1)[1]
        self.images = np.random.default_rng(0).integers(0, 256, (80, 3, 4, 4), np.uint8).repeat(8, 2).repeat(8, 3)

    def record(self, logits: np.ndarray, *, keep_pixels: bool = True, model: str = SERVED, repeats: int = 1) -> None:
        answers = [Answered("id", 1e9, 0.02, self.images[: len(logits)], logits)] * repeats
        info = BatchInfo(model_digest=model, model_version="1", images=CIFAR10, responses={"200": 1})
        write_batch(self.store.traffic, answers, info, keep_pixels=keep_pixels)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_agreement_is_counted_once_for_each_picture(world: World) -> None:
    logits = tiny_logits(world.images, seed=1)
    logits[:8] = -logits[:8]  # the served model saw another class in a tenth of the pictures
    world.record(logits, repeats=3)
    verdict = judge_shadow(world.store, world.candidate, ShadowConfig())
    assert verdict.passed
    assert "for 90.0% of 80 recorded pictures" in verdict.reason
    assert verdict.numbers["agreement"] == pytest.approx(0.9)
    assert "data:image/png" in str(verdict.numbers["pictures"].value)
    assert sum(record.data["num_images"] for record in verdict.numbers["changes"].records) == 8


def test_another_model_fails_the_check(world: World) -> None:
    world.record(tiny_logits(world.images, seed=2))
    verdict = judge_shadow(world.store, world.candidate, ShadowConfig())
    assert not verdict.passed
    assert "at least 80% expected" in verdict.reason


def test_nothing_is_compared_without_pictures_of_another_model(world: World) -> None:
    logits = tiny_logits(world.images, seed=1)

    def reason() -> str:
        verdict = judge_shadow(world.store, world.candidate, ShadowConfig())
        assert verdict.passed
        return verdict.reason

    assert "nothing was recorded" in reason()
    world.record(logits, keep_pixels=False)
    assert "0 distinct pictures were recorded" in reason()
    world.record(logits[:10], repeats=20)
    assert "10 distinct pictures were recorded" in reason()


def test_the_served_model_is_not_compared_with_itself(world: World) -> None:
    world.record(tiny_logits(world.images, seed=2), model=world.candidate)
    verdict = judge_shadow(world.store, world.candidate, ShadowConfig())
    assert "this is the model that was served" in verdict.reason


def test_models_of_other_classes_are_not_compared(world: World) -> None:
    spec = ImageSpec(classes=tuple("abcdefghij"))
    answers = [Answered("id", 1e9, 0.02, world.images, tiny_logits(world.images, seed=1))]
    info = BatchInfo(model_digest=SERVED, model_version="1", images=spec, responses={"200": 1})
    write_batch(world.store.traffic, answers, info, keep_pixels=True)
    assert "other classes" in judge_shadow(world.store, world.candidate, ShadowConfig()).reason


def test_a_model_that_the_public_key_does_not_verify_is_not_loaded(world: World) -> None:
    world.record(tiny_logits(world.images, seed=1))
    key = ECC.generate(curve="P-256").public_key().export_key(format="PEM")
    with pytest.raises(IntegrityError, match=r"model\.sig"):
        judge_shadow(world.store, world.candidate, ShadowConfig(), key)
