"""`python -m cifar_assets.seed_study` with the real trainer and MLflow's database."""

import json

import pytest
from mlflow.tracking import MlflowClient

from cifar_assets.contracts import MODEL_NAME
from resources.mlflow.resource import LocalMlflow
from tests.fixtures.cifar10 import TRAINED_MODEL
from tests.fixtures.workspace import Workspace

OVERRIDES = {"optimizer": "sgd", "width": 4, "epochs": 1, "batch_size": 64, "learning_rate": 0.1}

pytestmark = pytest.mark.timeout(900)


def test_a_second_command_trains_only_the_missing_seed_and_nothing_is_registered(workspace: Workspace) -> None:
    data = workspace.materialize("cifar10/raw_dataset,cifar10/processed_dataset")
    assert data.returncode == 0, data.stdout
    command = ["-m", "cifar_assets.seed_study", "--recipe", "resnet18", "--overrides", json.dumps(OVERRIDES), "--seeds"]
    first, second = workspace.python(*command, "1"), workspace.python(*command, "2")
    assert (first.returncode, second.returncode) == (0, 0), first.stdout + second.stdout
    assert [done.stdout.count("$ dg launch --job seed_study") for done in (first, second)] == [1, 1]
    assert "| 1 | " in first.stdout
    assert "| 2 | " in second.stdout
    with workspace.instance() as instance:
        assert instance.get_latest_materialization_event(TRAINED_MODEL) is None
    mlflow = MlflowClient(LocalMlflow().uri)
    assert not mlflow.search_model_versions(f"name = '{MODEL_NAME}'")
    experiment = mlflow.get_experiment_by_name("cifar10")
    assert experiment is not None
    runs = mlflow.search_runs([experiment.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 2
    assert len({run.data.tags["seed_study"] for run in runs}) == 1
