"""Trainings and commands that are canceled or killed: what Dagster and MLflow report, and that they continue."""

import os
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from cifar_assets.assets.keys import TRAINING_POOL
from resources.mlflow.resource import ATTEMPT_TAG, RUN_ID_TAG, LocalMlflow
from tests.fixtures.cifar10 import TRAINED_MODEL
from tests.fixtures.pausing import pausing
from tests.fixtures.workspace import SMALL_TRAINING, Workspace, command_of, wait_until

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def data(workspace: Workspace) -> None:
    done = workspace.materialize("cifar10/raw_dataset,cifar10/processed_dataset")
    assert done.returncode == 0, done.stdout
    LocalMlflow().prepare()
    MlflowClient(LocalMlflow().uri).search_experiments()  # creates the tables, which two processes cannot do


@dataclass(frozen=True)
class Training:
    """A training command, and the file that makes it pause."""

    process: "subprocess.Popen[bytes]"
    trainer: psutil.Process
    pause: Path
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text()


def start_training(workspace: Workspace, seed: int) -> Training:
    """Starts a training and waits until it pauses after an epoch, which has a checkpoint and is logged to MLflow."""
    before = len(mlflow_runs())
    log, pause = workspace.folder / f"seed-{seed}.log", workspace.folder / f"pause-{seed}"
    command = workspace.materialize_command("cifar10/trained_model", config(seed))
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=workspace.folder, env={**os.environ, **pausing(pause)}, stdout=output, stderr=output
        )

    def is_pausing() -> bool:
        known = any("train_loss" in run.data.metrics for run in mlflow_runs()[before:])
        return known and "Epoch 1/4" in log.read_text()

    wait_until(lambda: is_pausing() or process.poll() is not None, "the first epoch")
    assert process.poll() is None, log.read_text()
    children = psutil.Process(process.pid).children(recursive=True)
    trainer = next(child for child in children if "cifar_assets.training" in command_of(child))
    return Training(process, trainer, pause, log)


def config(seed: int) -> dict[str, Any]:
    return {"trained_model": {**SMALL_TRAINING, "seed": seed}}


def mlflow_runs() -> list[Run]:
    client = MlflowClient(LocalMlflow().uri)
    experiment = client.get_experiment_by_name("cifar10")
    if experiment is None:
        return []
    return sorted(client.search_runs([experiment.experiment_id]), key=lambda run: run.info.start_time)


@pytest.mark.usefixtures("data")
def test_canceled_training_is_killed_in_mlflow_and_can_be_resumed(workspace: Workspace) -> None:
    before = len(mlflow_runs())
    training = start_training(workspace, seed=1)
    training.process.send_signal(signal.SIGINT)
    assert training.process.wait(500) != 0, training.log
    assert not training.trainer.is_running()
    assert [run.info.status for run in mlflow_runs()[before:]] == ["KILLED"]
    assert training.log.count("Recipe resnet18") <= 2, "a canceled step was started again"
    with workspace.instance() as instance:
        pool = instance.event_log_storage.get_concurrency_info(TRAINING_POOL)
    assert (pool.active_slot_count, pool.pending_step_count) == (0, 0)

    done = workspace.materialize("cifar10/trained_model", config(seed=1))
    assert done.returncode == 0, done.stdout
    assert "Continuing from the checkpoint" in done.stdout
    assert [run.info.status for run in mlflow_runs()[before:]] == ["KILLED", "FINISHED"]


@pytest.mark.usefixtures("data")
def test_killed_trainer_is_failed_in_mlflow_and_retried_from_its_checkpoint(workspace: Workspace) -> None:
    before = len(mlflow_runs())
    training = start_training(workspace, seed=2)
    training.trainer.kill()
    training.pause.unlink()
    assert training.process.wait(500) == 0, training.log
    assert "Continuing from the checkpoint" in training.log
    failed, finished = mlflow_runs()[before:]
    assert (failed.info.status, finished.info.status) == ("FAILED", "FINISHED")
    assert (failed.data.tags[ATTEMPT_TAG], finished.data.tags[ATTEMPT_TAG]) == ("0", "1")
    assert failed.data.tags[RUN_ID_TAG] == finished.data.tags[RUN_ID_TAG]


def kill_command(training: Training) -> None:
    """Kill the command and wait for its trainer, which then stops by itself."""
    training.process.kill()
    training.process.wait()
    training.pause.unlink()
    wait_until(lambda: not command_of(training.trainer), "the trainer to end")


def training_runs_newest_first(instance: dg.DagsterInstance) -> list[dg.DagsterRun]:
    return [run for run in instance.get_runs() if TRAINED_MODEL in (run.asset_selection or ())]


@pytest.mark.usefixtures("data")
def test_next_command_fails_the_killed_run_and_resumes_the_training(workspace: Workspace) -> None:
    kill_command(start_training(workspace, seed=3))
    done = workspace.materialize("cifar10/trained_model", config(seed=3))
    assert done.returncode == 0, done.stdout
    with workspace.instance() as instance:
        succeeded, killed, *_ = training_runs_newest_first(instance)
    assert f"Run {killed.run_id} was found dead" in done.stdout
    assert "Continuing from the checkpoint" in done.stdout
    assert (killed.status, succeeded.status) == (dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.SUCCESS)
    left, finished = (run.info.status for run in mlflow_runs()[-2:])
    # if the trainer did not reach MLflow within its few seconds, the next attempt closes the run
    assert (left in ("KILLED", "FAILED"), finished) == (True, "FINISHED")


@pytest.mark.usefixtures("data")
def test_dagster_dev_marks_the_run_of_a_killed_command_as_failed(workspace: Workspace) -> None:
    with workspace.dagster_dev(), workspace.instance() as instance:
        training = start_training(workspace, seed=4)
        killed = training_runs_newest_first(instance)[0]
        kill_command(training)

        def failed() -> bool:
            run = instance.get_run_by_id(killed.run_id)
            return run is not None and run.is_finished

        wait_until(failed, "the daemon to fail the run")
        (event,) = instance.all_logs(killed.run_id, of_type=dg.DagsterEventType.RUN_FAILURE)
        assert "Its process on this machine was killed or crashed" in (event.get_dagster_event().message or "")
        pool = instance.event_log_storage.get_concurrency_info(TRAINING_POOL)
        assert (pool.active_slot_count, pool.pending_step_count) == (0, 0)
