"""The job seed_study and its command, with a trainer that only stores models."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from cifar_assets.assets.keys import SEED_STUDY, key_of
from cifar_assets.assets.record import materializations
from cifar_assets.seed_study import __main__ as command
from cifar_assets.seed_study.job import build_seed_study
from cifar_assets.training.spec import JobSpec
from resources.errors import TrainingError
from resources.step_context import StepContext
from resources.trainer.contract import TrainingSpec
from resources.trainer.interface import TrainingResult, TrainingScale
from tests.fixtures.cifar10 import DATA_SET, PROCESSED_DATASET, TRAINED_MODEL
from tests.fixtures.orchestration import MlflowAway, StoringTrainer, World
from tests.fixtures.tiny_data import store_manifest

ACCURACIES = (0.80, 0.84, 0.85)


class SeedTrainer(StoringTrainer):
    """Stores a model with the accuracy of its seed, and writes the spec into a file. May fail for a seed."""

    path: str
    fails: int | None = None

    def train(
        self, context: StepContext, spec: TrainingSpec, scale: TrainingScale, child_environment: Mapping[str, str]
    ) -> TrainingResult:
        assert isinstance(spec, JobSpec)
        with Path(self.path).open("a") as file:
            file.write(f"{spec.model_dump_json()}\n")
        if spec.seed == self.fails:
            raise TrainingError("the trainer died")
        self.metrics["test_accuracy"] = ACCURACIES[spec.seed]
        return super().train(context, spec, scale, child_environment)


class Study:
    """The command on a store and an instance. Its runs are in this process."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.world = World(folder)
        self.path = folder / "specs"
        self.fails: int | None = None
        monkeypatch.setattr(command, "_instance", lambda: nullcontext(self.world.instance))
        monkeypatch.setattr(command, "resources_for", lambda *_: {"object_store": self.world.object_store})
        monkeypatch.setattr(command, "_launch", self.launch)

    def launch(self, _: Any, partition: str, config: Mapping[str, Any]) -> None:
        resources = {
            "object_store": self.world.object_store,
            "mlflow": MlflowAway(tracking_uri="http://mlflow.invalid"),
            "trainer": SeedTrainer(path=str(self.path), fails=self.fails),
        }
        definitions = dg.Definitions(jobs=[build_seed_study(DATA_SET)], resources=resources)
        definitions.resolve_job_def("seed_study").execute_in_process(
            partition_key=partition,
            instance=self.world.instance,
            run_config={"ops": {"train_seed": {"config": dict(config)}}},
            raise_on_error=False,
        )

    def trained(self) -> list[JobSpec]:
        """The specs of all trainings so far, in order."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return [JobSpec.model_validate_json(line) for line in lines]


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    found = Study(tmp_path, monkeypatch)
    found.world.known_data()
    return found


def test_a_study_trains_each_seed_once_and_prints_mean_deviation_and_the_nearest(
    study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--seeds", "3"]) == 0
    printed = capsys.readouterr().out
    assert "| 3 | 83.00% | 2.65 | 80.00% | 85.00% | fast-1 |" in printed
    specs = study.trained()
    assert [spec.seed for spec in specs] == [0, 1, 2]
    assert len({spec.model_copy(update={"seed": 0}).identity for spec in specs}) == 1
    recorded = list(materializations(study.world.instance, key_of(DATA_SET, SEED_STUDY)))
    assert [made.materialization.partition for made in recorded] == ["fast-2", "fast-1", "fast-0"]
    assert f"Model of fast-1: {recorded[1].digest}" in printed
    assert command.main(["--seeds", "3"]) == 0
    assert len(study.trained()) == 3
    assert capsys.readouterr().out == printed


def test_a_study_registers_and_materializes_no_model(study: Study) -> None:
    command.main(["--seeds", "1"])
    (spec,) = study.trained()
    assert spec.mlflow is not None
    assert spec.mlflow.registered_model is None
    assert not spec.write_baseline_copies
    assert spec.mlflow.tags["seed_study"] == spec.identity
    assert study.world.instance.get_latest_materialization_event(TRAINED_MODEL) is None


def test_a_failed_seed_is_named_and_trained_by_the_next_command(
    study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    study.fails = 1
    assert command.main(["--seeds", "3"]) == 1
    assert "not trained: fast-1" in capsys.readouterr().err
    study.fails = None
    assert command.main(["--seeds", "3"]) == 0
    assert [spec.seed for spec in study.trained()] == [0, 1, 2, 1]


def test_other_recipes_fields_and_data_are_other_studies(study: Study) -> None:
    for changed in ([], ["--recipe", "good"], ["--overrides", '{"epochs": 7}']):
        assert command.main(["--seeds", "2", *changed]) == 0
    other = store_manifest(study.world.object_store.processed, image_size=64)
    study.world.report(PROCESSED_DATASET, other)
    assert command.main(["--seeds", "2"]) == 0
    assert len(study.trained()) == 8
    assert len({spec.identity for spec in study.trained()}) == 8


def test_a_partition_that_was_trained_before_is_not_trained_again(study: Study) -> None:
    for _ in range(2):
        study.launch(None, "fast-0", {})
    assert len(study.trained()) == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--overrides", '{"epoch": 1}'], "overrides: epoch cannot be set"),
        (["--overrides", "[1]"], "--overrides is '[1]': expected a JSON object"),
        (["--recipe", "finetune"], "set start_from"),
        (["--recipe", "finetune", "--start-from", "a.safetensors"], "'a.safetensors' is not a file"),
        (["--data-set", "animals"], "There is no data set 'animals'"),
    ],
)
def test_invalid_arguments_are_named_before_a_run(
    study: Study, arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments) == 1
    assert text in capsys.readouterr().err
    assert not study.trained()


def test_without_a_dataset_the_command_to_make_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Study(tmp_path, monkeypatch)
    assert command.main([]) == 1
    assert "dg launch --assets '+key:\"cifar10/processed_dataset\"'" in capsys.readouterr().err
