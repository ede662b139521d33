"""The loop in this process: what it computes, and that it can be interrupted and continued at any step."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cifar_assets.training.checkpoint import CheckpointStore, EpochRecord, Position
from cifar_assets.training.data import EpochAugmentation, open_data
from cifar_assets.training.device import choose_processor
from cifar_assets.training.distributed import Processes, StopSignal, TrainingStopped
from cifar_assets.training.loop import DivergedError, Trainer
from cifar_assets.training.recipes import RECIPES
from cifar_assets.training.spec import JobSpec
from resources.errors import ConfigError, DataError, StoreError
from resources.object_store import FolderStore, open_store
from tests.unit.training.conftest import SpecMaker
from tests.unit.training.small_dataset import store_dataset

NUM_STEPS = 18
"""Three epochs of 96 images in batches of 16."""


def make_trainer(
    spec: JobSpec,
    stop: StopSignal | None = None,
    processes: Processes | None = None,
    checkpoints: CheckpointStore | None = None,
) -> Trainer:
    processor = choose_processor(spec.execution, spec.recipe.precision)
    data = open_data(spec, processor.device)
    checkpoints = checkpoints or CheckpointStore(open_store(spec.output_uri), 3)
    return Trainer(spec, data, processor, processes or Processes(), checkpoints, stop or StopSignal())


def finish(trainer: Trainer, on_step: Callable[[], None] | None = None) -> list[EpochRecord]:
    """Train to the end; `on_step` is called at the end of each step."""
    step = trainer.step

    def step_and_tell(network: nn.Module, batch: NDArray[np.int64], augmentation: EpochAugmentation) -> None:
        step(network, batch, augmentation)
        if on_step is not None:
            on_step()

    trainer.step = step_and_tell
    records: list[EpochRecord] = []
    trainer.train(records.append)
    return records


def final_tensors(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.state.tensors().items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    different = [name for name, value in first.items() if not torch.equal(value, second[name])]
    assert different == []


def elsewhere(spec: JobSpec, path: Path) -> JobSpec:
    return spec.model_copy(update={"output_uri": FolderStore(path).uri()})


@pytest.mark.parametrize("recipe", ["progressive", *sorted(RECIPES)])
def test_a_run_cut_at_every_step_ends_as_an_undisturbed_one(make_spec: SpecMaker, tmp_path: Path, recipe: str) -> None:
    spec = make_spec(recipe)
    whole = make_trainer(elsewhere(spec, tmp_path / "whole"))
    records = finish(whole)

    steps_done = 0
    while True:
        stop = StopSignal()
        trainer = make_trainer(spec, stop)
        assert trainer.global_step == steps_done

        def stop_now(signal: StopSignal = stop) -> None:
            signal.is_set = True

        if steps_done == NUM_STEPS:
            break
        with pytest.raises(TrainingStopped, match=f"step {steps_done + 1} of {NUM_STEPS}"):
            finish(trainer, stop_now)
        steps_done += 1
    finish(trainer)
    assert_same(final_tensors(whole), final_tensors(trainer))
    told = [(r.train_loss, r.validation_loss, r.validation_accuracy) for r in trainer.state.position.history]
    assert told == [(r.train_loss, r.validation_loss, r.validation_accuracy) for r in records]


def test_a_step_redone_after_a_kill_gives_the_same(make_spec: SpecMaker, tmp_path: Path) -> None:
    """A kill loses the steps since the last checkpoint, which are repeated."""
    spec = make_spec("progressive", spec={"execution": {"threads": 1, "checkpoint_every_steps": 4}})
    whole = make_trainer(elsewhere(spec, tmp_path / "whole"))
    finish(whole)

    class KilledError(Exception):
        pass

    for kill_after in (3, 6, 7, 1, 5):
        steps = iter(range(kill_after))

        def kill(left: object = steps) -> None:
            if next(left, None) is None:  # pyright: ignore[reportCallIssue, reportArgumentType]
                raise KilledError

        with pytest.raises(KilledError):
            finish(make_trainer(spec), kill)
    trainer = make_trainer(spec)
    assert trainer.resumed_from
    finish(trainer)
    assert_same(final_tensors(whole), final_tensors(trainer))


class FailingCheckpoints(CheckpointStore):
    """Fails to save at the given steps."""

    def __init__(self, spec: JobSpec, transient: bool, steps: set[int]):
        super().__init__(open_store(spec.output_uri), 3)
        self._transient, self._failing = transient, steps

    def save(self, step: int, tensors: dict[str, Tensor], position: Position) -> None:
        if step in self._failing:
            raise StoreError("away", transient=self._transient)
        super().save(step, tensors, position)


def test_store_outage_skips_checkpoints_and_training_continues(make_spec: SpecMaker, caplog) -> None:
    spec = make_spec(spec={"execution": {"threads": 1, "checkpoint_every_steps": 2}})
    trainer = make_trainer(spec, checkpoints=FailingCheckpoints(spec, True, {2, 6, 8}))
    with caplog.at_level("WARNING"):
        finish(trainer)
    assert caplog.messages == [f"The checkpoint of step {step} may not be stored: away" for step in (2, 6, 8)]
    assert make_trainer(spec).resumed_from == NUM_STEPS


def test_a_stop_while_the_store_is_away_is_a_stop(make_spec: SpecMaker) -> None:
    spec, stop = make_spec(), StopSignal()
    trainer = make_trainer(spec, stop, checkpoints=FailingCheckpoints(spec, True, {8}))

    def stop_at_8() -> None:
        stop.is_set = trainer.global_step == 7

    with pytest.raises(TrainingStopped, match="step 8 of 18: start the same spec again"):
        finish(trainer, stop_at_8)
    assert make_trainer(spec).resumed_from == 6


def test_a_store_that_refuses_checkpoints_ends_the_training(make_spec: SpecMaker) -> None:
    spec = make_spec()
    with pytest.raises(StoreError, match="away"):
        finish(make_trainer(spec, checkpoints=FailingCheckpoints(spec, False, {6})))


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors.pop("network.fc.bias"),
        lambda tensors: tensors.pop("momentum.0"),
        lambda tensors: tensors.update(loss_sum=torch.zeros(2)),
    ],
    ids=["weight", "momentum", "shape"],
)
def test_a_whole_checkpoint_that_does_not_fit_falls_back_to_the_one_before(
    make_spec: SpecMaker, caplog, change
) -> None:
    spec = make_spec(epochs=2)
    finish(make_trainer(spec))
    checkpoints = CheckpointStore(open_store(spec.output_uri), 3)
    newest = checkpoints.load_newest()
    assert newest
    change(newest.tensors)
    checkpoints.save(newest.step + 1, newest.tensors, newest.position)
    with caplog.at_level("WARNING"):
        assert make_trainer(spec).resumed_from == newest.step
    assert f"step-{newest.step + 1:09d}" in caplog.text


def test_a_start_after_none_that_fits_is_a_fresh_one(make_spec: SpecMaker, tmp_path: Path) -> None:
    spec = make_spec("fast", epochs=1)
    trainer = make_trainer(spec)
    fresh = final_tensors(trainer)
    finish(trainer)
    tensors = final_tensors(trainer)
    del tensors["loss_sum"]
    checkpoints = CheckpointStore(open_store(spec.output_uri), 3)
    checkpoints.clear()
    checkpoints.save(6, tensors, trainer.state.position)
    trainer = make_trainer(spec)
    assert trainer.resumed_from is None
    assert_same(fresh, final_tensors(trainer))


def test_a_continuation_that_rounds_otherwise_says_so(make_spec: SpecMaker, caplog) -> None:
    spec = make_spec(epochs=1)
    trainer = make_trainer(spec)
    finish(trainer)
    with caplog.at_level("WARNING"):
        assert make_trainer(spec).resumed_from == 6
        assert caplog.text == ""
        position = trainer.state.position
        position.made_with = {"processes": 3, "device": "cpu", "precision": "bfloat16"}
        CheckpointStore(open_store(spec.output_uri), 3).save(7, trainer.state.tensors(), position)
        assert make_trainer(spec).resumed_from == 7
    assert "was made with {'processes': 3, 'device': 'cpu', 'precision': 'bfloat16'}" in caplog.text


def test_images_read_batch_by_batch_train_alike(make_spec: SpecMaker, tmp_path: Path) -> None:
    resident = make_trainer(make_spec())
    finish(resident)
    streamed_spec = make_spec(spec={"execution": {"threads": 1, "resident_megabytes": 0}})
    streamed = make_trainer(elsewhere(streamed_spec, tmp_path / "streamed"))
    finish(streamed)
    assert_same(final_tensors(resident), final_tensors(streamed))


def test_seeds_differ(make_spec: SpecMaker, tmp_path: Path) -> None:
    first = make_trainer(make_spec(epochs=1))
    second = make_trainer(elsewhere(make_spec(epochs=1, spec={"seed": 4}), tmp_path / "second"))
    assert finish(first)[0].train_loss != finish(second)[0].train_loss


def test_the_last_weights_are_published(make_spec: SpecMaker) -> None:
    trainer = make_trainer(make_spec("baseline", epochs=1))
    finish(trainer)
    last = trainer.state.network.state_dict()
    assert_same(dict(trainer.published().state_dict()), dict(last))


def test_one_step_of_the_baseline_recipe_is_plain_sgd(make_spec: SpecMaker) -> None:
    """Against a step written out in torch: same loss, same weights."""
    spec = make_spec("baseline", epochs=1, translate=0, flip="none", batch_size=96)
    trainer = make_trainer(spec)
    network = copy.deepcopy(trainer.state.network).train()
    manifest = open_data(spec, torch.device("cpu")).manifest
    split = open_data(spec, torch.device("cpu")).train
    everything = np.arange(96)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (manifest.mean, manifest.std))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    loss = torch.nn.functional.cross_entropy(
        network((split.images(everything) / 255 - mean) / std), split.labels_at(everything)
    )
    loss.backward()
    optimizer.step()
    expected = {name: value.clone() for name, value in network.state_dict().items()}
    records = finish(trainer)
    assert records[0].train_loss == pytest.approx(loss.item(), rel=1e-5)
    for name, value in trainer.state.network.state_dict().items():
        assert torch.allclose(value.float(), expected[name].float(), atol=1e-5), name


def test_a_golden_loss_curve(make_spec: SpecMaker) -> None:
    """Pinned numbers. A change that is meant to alter them also increments spec.ALGORITHM."""
    records = finish(
        make_trainer(make_spec("progressive", epochs=4, learning_rate=0.01, warmup=0.2, label_smoothing=0.1))
    )
    losses = [round(record.train_loss, 3) for record in records]
    assert losses == pytest.approx(GOLDEN_LOSSES, abs=0.005)
    assert [record.resolution for record in records] == [16, 16, 24, 32]


GOLDEN_LOSSES = [2.406, 2.342, 2.457, 2.518]


def test_a_diverging_training_is_an_error_and_leaves_no_checkpoint(make_spec: SpecMaker) -> None:
    trainer = make_trainer(make_spec("baseline", learning_rate=1e30))
    with pytest.raises(DivergedError, match="learning_rate"):
        finish(trainer)
    assert make_trainer(make_spec("baseline", learning_rate=1e30)).resumed_from is None


def test_weights_ruined_by_the_last_step_are_an_error(make_spec: SpecMaker) -> None:
    """The only loss is finite: it is that of the initial weights."""
    spec = make_spec("baseline", learning_rate=1e30, weight_decay=1e30, epochs=1, batch_size=96)
    trainer = make_trainer(spec)
    with pytest.raises(DivergedError, match=r"network\.\S+ is not finite in epoch 1, by step 1.* learning_rate"):
        finish(trainer)
    assert torch.isfinite(trainer.state.loss_sum)
    assert make_trainer(spec).resumed_from is None


def test_a_stop_right_after_weights_were_ruined_saves_nothing(make_spec: SpecMaker) -> None:
    spec, stop = make_spec("baseline", learning_rate=1e30, weight_decay=1e30, epochs=1), StopSignal()
    stop.is_set = True
    with pytest.raises(DivergedError, match="not finite"):
        finish(make_trainer(spec, stop))
    assert make_trainer(spec).resumed_from is None


def test_outputs_that_overflow_in_validation_are_an_error(make_spec: SpecMaker) -> None:
    """Every weight is finite, and so is the training loss, whose batch norm divides by the batch's own variance."""
    spec = make_spec("baseline", epochs=1, learning_rate=1e-8)
    trainer = make_trainer(spec)

    def enlarge(*arguments: object) -> None:
        if trainer.global_step == 5:
            trainer.state.network.state_dict()["fc.weight"].fill_(3e38)

    trainer.state.optimizers[0].register_step_post_hook(enlarge)
    with pytest.raises(DivergedError, match="the validation loss is not finite"):
        finish(trainer)
    assert make_trainer(spec).resumed_from is None


def test_a_checkpoint_that_is_not_finite_is_passed_over(make_spec: SpecMaker, caplog) -> None:
    spec = make_spec("baseline", epochs=1)
    trainer = make_trainer(spec)
    finish(trainer)
    tensors = final_tensors(trainer)
    tensors["network.fc.bias"][0] = float("nan")
    CheckpointStore(open_store(spec.output_uri), 3).save(7, tensors, trainer.state.position)
    with caplog.at_level("WARNING"):
        assert make_trainer(spec).resumed_from == NUM_STEPS // 3
    assert "network.fc.bias contains numbers that are not finite" in caplog.text


def test_batches_too_small_for_the_processes_are_refused(make_spec: SpecMaker) -> None:
    with pytest.raises(ConfigError, match="5 processes"):
        make_trainer(make_spec(batch_size=8), processes=Processes(0, 5))


def test_an_empty_split_is_refused(make_spec: SpecMaker, tmp_path: Path) -> None:
    digest = store_dataset(tmp_path / "processed", validation=1)
    spec = make_spec(spec={"dataset_uri": FolderStore(tmp_path / "processed").uri(digest), "dataset_digest": digest})
    finish(make_trainer(spec))
    empty = tmp_path / "empty"
    digest = store_dataset(empty, validation=0)
    spec = make_spec(spec={"dataset_uri": FolderStore(empty).uri(digest), "dataset_digest": digest})
    with pytest.raises(DataError, match="validation split is empty"):
        make_trainer(spec)
