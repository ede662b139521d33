from pathlib import Path

import dagster as dg
import pytest

from cifar_assets.training.spec import JobSpec
from resources.trainer.interface import TrainingMessages, TrainingScale
from resources.trainer.local import LocalTrainer
from tests.unit.training import damaging_trainer
from tests.unit.training.conftest import SpecMaker


def train(spec: JobSpec, module: str = "cifar_assets.training") -> dg.ExecuteInProcessResult:
    """Run a job with the local trainer in an asset."""

    @dg.asset
    def model(context: dg.AssetExecutionContext, trainer: LocalTrainer) -> dg.MaterializeResult:
        trainer.train(context, spec, TrainingScale(), {})
        return dg.MaterializeResult()

    return dg.materialize([model], resources={"trainer": LocalTrainer(module=module)})


def test_a_shell_of_another_training_makes_no_process_wait(
    make_spec: SpecMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variables of a shell started by torchrun or in a pod of a PyTorchJob."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "192.0.2.1", "PET_NNODES": "2"}.items():
        monkeypatch.setenv(name, value)
    train(make_spec("baseline", epochs=1))
    assert list((tmp_path / "models").glob("*/manifest.json"))


def test_a_learning_rate_that_ruins_the_weights_is_named(
    make_spec: SpecMaker, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Exception, match="the training diverged"):
        train(make_spec("baseline", epochs=1, learning_rate=1e30, weight_decay=1e30, batch_size=96))
    output = capfd.readouterr().out
    assert "Lower learning_rate" in output
    assert "unexpected reason" not in output


def test_damaged_messages_are_ignored(make_spec: SpecMaker, capfd: pytest.CaptureFixture[str]) -> None:
    done = train(make_spec("baseline", epochs=3), module=damaging_trainer.__name__)
    epochs = [
        e.asset_observation_data.asset_observation.metadata["epoch"].value
        for e in done.all_events
        if e.is_asset_observation
    ]
    assert epochs == [1, 2, 3]
    assert "Ignoring a message in file:///" in capfd.readouterr().err


def test_training_without_a_result_is_named(make_spec: SpecMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(damaging_trainer.WITHOUT_RESULT, "1")
    with pytest.raises(Exception, match="ended without reporting a model"):
        train(make_spec("baseline"), module=damaging_trainer.__name__)


def test_all_of_the_first_epochs_then_one_a_second_and_the_last_are_observed() -> None:
    """1,000 epochs, ten a second."""
    now = 0.0

    @dg.asset
    def model(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        nonlocal now
        messages = TrainingMessages(context, lambda: now)
        for epoch in range(1, 1001):
            now = epoch / 10
            messages.handle({"type": "epoch", "epoch": epoch, "epochs": 1000})
        for _ in range(2):
            messages.close()
        return dg.MaterializeResult()

    events = dg.materialize([model]).all_events
    observed = [e.asset_observation_data.asset_observation for e in events if e.is_asset_observation]
    epochs = [int(str(each.metadata["epoch"].value)) for each in observed]
    assert epochs[:20] == list(range(1, 21))
    assert 95 <= len(epochs[20:]) <= 100
    assert epochs[-1] == 1000
    assert len(set(epochs)) == len(epochs)
