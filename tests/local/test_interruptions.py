"""Trainings and commands that are cancelled or killed: what Dagster and MLflow report, and that they continue."""

import signal
import subprocess
import time
from pathlib import Path

import dagster as dg
import psutil
import pytest
from mlflow.entities import Run
from mlflow.tracking import MlflowClient

from cifar_assets.assets.keys import TRAINING_POOL
from resources.mlflow.resource import ATTEMPT_TAG, RUN_ID_TAG, LocalMlflow
from tests.fixtures.workspace import SMALL_TRAINING, Workspace, wait_until

LONG_TRAINING = {**SMALL_TRAINING, "overrides": {**SMALL_TRAINING["overrides"], "epochs": 6}}


@pytest.fixture(scope="module")
def data(workspace: Workspace) -> None:
    done = workspace.materialize("cifar10/raw_dataset,cifar10/processed_dataset")
    assert done.returncode == 0, done.stdout


def start_training(workspace: Workspace, seed: int) -> tuple[subprocess.Popen[bytes], Path]:
    """Starts the long training and waits until an epoch is done."""
    log = workspace.folder / f"seed-{seed}.log"
    command = workspace.materialize_command("cifar10/trained_model", {"trained_model": {**LONG_TRAINING, "seed": seed}})
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=workspace.folder, stdout=output, stderr=output)
    wait_until(lambda: "Epoch 1/6" in log.read_text() or process.poll() is not None, "the first epoch")
    assert process.poll() is None, log.read_text()
    return process, log


def trainer_of(process: subprocess.Popen[bytes]) -> psutil.Process:
    return next(
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "cifar_assets.training" in child.cmdline()
    )


def mlflow_runs() -> list[Run]:
    client = MlflowClient(LocalMlflow().uri)
    experiment = client.get_experiment_by_name("cifar10")
    assert experiment is not None
    return sorted(client.search_runs([experiment.experiment_id]), key=lambda run: run.info.start_time)


@pytest.mark.usefixtures("data")
def test_a_cancelled_training_stops_is_killed_in_mlflow_and_continues_when_asked(workspace: Workspace) -> None:
    process, log = start_training(workspace, seed=1)
    trainer = trainer_of(process)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) != 0, log.read_text()
    assert not trainer.is_running()
    assert [run.info.status for run in mlflow_runs()] == ["KILLED"]
    assert log.read_text().count("Recipe resnet18") <= 2, "a cancelled step was started again"
    with workspace.instance() as instance:
        pool = instance.event_log_storage.get_concurrency_info(TRAINING_POOL)
    assert (pool.active_slot_count, pool.pending_step_count) == (0, 0)

    done = workspace.materialize("cifar10/trained_model", {"trained_model": {**LONG_TRAINING, "seed": 1}})
    assert done.returncode == 0, done.stdout
    assert "Continuing from the checkpoint" in done.stdout
    assert [run.info.status for run in mlflow_runs()] == ["KILLED", "FINISHED"]


@pytest.mark.usefixtures("data")
def test_a_killed_trainer_is_failed_in_mlflow_and_tried_again_from_its_checkpoint(workspace: Workspace) -> None:
    before = len(mlflow_runs())
    process, log = start_training(workspace, seed=2)
    time.sleep(1)
    trainer_of(process).kill()
    assert process.wait(240) == 0, log.read_text()
    assert "Continuing from the checkpoint" in log.read_text()
    failed, finished = mlflow_runs()[before:]
    assert (failed.info.status, finished.info.status) == ("FAILED", "FINISHED")
    assert (failed.data.tags[ATTEMPT_TAG], finished.data.tags[ATTEMPT_TAG]) == ("0", "1")
    assert failed.data.tags[RUN_ID_TAG] == finished.data.tags[RUN_ID_TAG]


def runs_newest_first(workspace: Workspace) -> list[dg.DagsterRun]:
    with workspace.instance() as instance:
        return list(instance.get_runs())


@pytest.mark.usefixtures("data")
def test_the_command_after_a_killed_one_fails_its_run_and_continues_the_training(workspace: Workspace) -> None:
    process, _log = start_training(workspace, seed=3)
    wait_until(lambda: mlflow_runs()[-1].info.status == "RUNNING", "the training's run in MLflow")
    time.sleep(1)
    process.kill()
    process.wait()
    done = workspace.materialize("cifar10/trained_model", {"trained_model": {**LONG_TRAINING, "seed": 3}})
    assert done.returncode == 0, done.stdout
    succeeded, killed, *_ = runs_newest_first(workspace)
    assert f"Run {killed.run_id} was found dead" in done.stdout
    assert "Continuing from the checkpoint" in done.stdout
    assert (killed.status, succeeded.status) == (dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.SUCCESS)
    left, finished = (run.info.status for run in mlflow_runs()[-2:])
    # the trainer has seconds to tell MLflow; where they were too few, the next attempt closes the run
    assert (left in ("KILLED", "FAILED"), finished) == (True, "FINISHED")


@pytest.mark.usefixtures("data")
def test_dagster_dev_fails_the_run_of_a_killed_command(workspace: Workspace) -> None:
    with workspace.dagster_dev(), workspace.instance() as instance:
        process, _log = start_training(workspace, seed=4)
        process.kill()
        process.wait()
        killed = instance.get_runs(limit=1)[0]

        def failed() -> bool:
            run = instance.get_run_by_id(killed.run_id)
            return run is not None and run.is_finished

        wait_until(failed, "the daemon to fail the run", 120)
        (event,) = instance.all_logs(killed.run_id, of_type=dg.DagsterEventType.RUN_FAILURE)
        assert "Its process on this machine was killed or crashed" in (event.get_dagster_event().message or "")
        pool = instance.event_log_storage.get_concurrency_info(TRAINING_POOL)
        assert (pool.active_slot_count, pool.pending_step_count) == (0, 0)
