"""A trained model answers what a served model was sent; with a real server in tests/local/test_monitoring.py."""

from pathlib import Path

import numpy as np
import pytest
from Crypto.PublicKey import ECC

from cifar_assets.checks.shadow import ShadowConfig, judge_shadow, mcnemar
from cifar_assets.contracts import CIFAR10, CLASSES, ImageSpec
from cifar_assets.dataset.versions.reader import open_split
from cifar_assets.labelling import batches
from cifar_assets.labelling.batches import Batch, Desk, Picture
from cifar_assets.traffic.records import Answered, BatchInfo, Feedback, write_batch
from resources.errors import IntegrityError
from resources.object_store.resource import LocalObjectStore
from tests.fixtures.tiny_data import store_tiny_data
from tests.unit.serving.tiny_model import store_tiny_model, tiny_logits

SERVED = "a" * 64


class World:
    """A trained model, and recorded traffic of a served one."""

    def __init__(self, folder: Path):
        self.store = LocalObjectStore(path=str(folder))
        self.candidate = store_tiny_model(self.store.models, seed=1)[1]
        self.images = np.random.default_rng(0).integers(0, 256, (80, 3, 4, 4), np.uint8).repeat(8, 2).repeat(8, 3)

    def record(
        self,
        logits: np.ndarray,
        *,
        keep_pixels: bool = True,
        model: str = SERVED,
        repeats: int = 1,
        feedback: tuple[Feedback, ...] = (),
    ) -> None:
        answers = [Answered("id", 1e9, 0.02, self.images[: len(logits)], logits)] * repeats
        info = BatchInfo(model_digest=model, model_version="1", images=CIFAR10, responses={"200": 1}, feedback=feedback)
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


def test_labels_say_which_model_is_right(tmp_path: Path) -> None:
    """A program labels three pictures, of which the new model was trained on two; a person labels eleven others."""
    world = World(tmp_path)
    data = store_tiny_data(world.store.root())
    candidate = store_tiny_model(world.store.models, seed=1, dataset=data.processed)[1]
    world.images[:2] = open_split(world.store.processed, data.processed, "train").take([0, 1])
    truth = [CLASSES[label] for label in tiny_logits(world.images, seed=1).argmax(axis=1)]
    logits = tiny_logits(world.images, seed=1)
    logits[:12] = -logits[:12]  # only the new model is right
    feedback = tuple(Feedback(request_id="id", index=index, label=truth[index], time=1e9) for index in range(3))
    world.record(logits, feedback=feedback)
    pictures = tuple(
        Picture(file=f"{index}.png", request_id="id", index=index, guess="cat", confidence=0.5, reason="uncertain")
        for index in range(3, 14)
    )
    batch = Batch(model_digest=SERVED, classes=CLASSES, pictures=pictures)
    batches.write_batch(world.store.raw, "one", batch, [b"a PNG file"] * len(pictures))
    desk = Desk(world.store.raw, None, "ada")
    for index in range(3, 14):
        desk.label(f"{index}.png", truth[index])
    verdict = judge_shadow(world.store, candidate, ShadowConfig())
    assert verdict.passed
    assert "Of 12 pictures with a label that it was not trained on, 10 are right only with it, 0 only" in verdict.reason
    assert verdict.numbers["latency_ms"] > 0
    for index in range(3, 14):
        desk.label(f"{index}.png", CLASSES[logits[index].argmax()])
    worse = judge_shadow(world.store, candidate, ShadowConfig())
    assert not worse.passed
    assert "1 are right only with it, 9 only with the served model" in worse.reason


@pytest.mark.parametrize(
    ("num_better", "num_worse", "p_value"), [(0, 0, 1), (5, 5, 1), (1, 0, 1), (10, 0, 2**-9), (1, 7, 0.0703125)]
)
def test_mcnemar_is_exact(num_better: int, num_worse: int, p_value: float) -> None:
    assert mcnemar(num_better, num_worse) == mcnemar(num_worse, num_better) == p_value
