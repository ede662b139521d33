"""What a training logs to MLflow, and that it does not depend on MLflow."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from cifar_assets.training.spec import JobSpec
from resources.trainer.contract import EXIT_BAD_SPEC, EXIT_RESUME
from tests.fixtures.pausing import pausing
from tests.fixtures.ports import free_port
from tests.fixtures.workspace import wait_until
from tests.unit.training.jobs import Workplace, fork_trainer, json_file, run_forked, start_trainer, wait_for_line

pytestmark = pytest.mark.timeout(1800)

TAGS = {"dagster.run_id": "run-1", "dagster.attempt": "0"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    place = Workplace.make(tmp_path_factory.mktemp("mlflow"))
    # the tables take seconds to make: once is enough
    MlflowClient(tracking_uri(place)).search_experiments()
    return place


def tracking_uri(place: Workplace) -> str:
    return f"sqlite:///{place.folder}/mlflow.db"


def tracked(place: Workplace, experiment: str, recipe_fields: dict | None = None, **target: object) -> JobSpec:
    """A job tracked in an experiment of its own."""
    mlflow = {
        "tracking_uri": tracking_uri(place),
        "experiment": experiment,
        "artifact_uri": (place.folder / "artifacts" / experiment).as_uri(),
        "registered_model": experiment,
        "tags": TAGS,
        "patience_seconds": 400,
        **target,
    }
    return place.spec(experiment, recipe_fields=recipe_fields or {}, mlflow=mlflow)


def runs_of(place: Workplace, experiment: str) -> list[Run]:
    """Runs of an experiment, oldest first; none if the experiment does not exist."""
    client = MlflowClient(tracking_uri(place))
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return []
    return list(client.search_runs([found.experiment_id], order_by=["attributes.start_time ASC"]))


def test_a_training_is_tracked_and_its_model_registered(place: Workplace) -> None:
    code, output = run_forked(tracked(place, "success"))
    assert code == 0, output
    digest, metrics = place.only_model("success")
    (run,) = runs_of(place, "success")
    assert run.info.status == "FINISHED"
    assert TAGS.items() <= run.data.tags.items()
    assert run.data.tags["model_digest"] == digest
    assert run.data.params["recipe.learning_rate"] == "0.05"
    assert run.data.metrics["test_accuracy"] == metrics["test_accuracy"]

    client = MlflowClient(tracking_uri(place))
    history = client.get_metric_history(run.info.run_id, "validation_accuracy")
    assert [(m.step, m.value) for m in history] == [
        (record["epoch"] + 1, record["validation_accuracy"]) for record in metrics["history"]
    ]
    artifacts = {Path(item.path).name for item in client.list_artifacts(run.info.run_id, "model")}
    assert {"model.onnx", "model.safetensors", "metrics.json", "MODEL_CARD.md", "manifest.json"} <= artifacts
    (version,) = client.search_model_versions("name = 'success'")
    assert version.run_id == run.info.run_id
    assert version.tags["model_digest"] == digest
    assert version.tags["dataset_digest"] == place.digest
    assert version.tags["test_accuracy"] == f"{metrics['test_accuracy']:.4f}"
    assert version.tags["dagster.run_id"] == "run-1"
    assert not version.aliases


def test_failed_training_and_its_retry_are_separate_runs(place: Workplace) -> None:
    """The loss becomes NaN in the second epoch; the retry uses a smaller learning rate."""
    bad = {"warmup": 0.5, "learning_rate": 1e30}
    code, output = run_forked(tracked(place, "failure", bad))
    assert code == EXIT_BAD_SPEC, output
    assert "learning_rate" in output
    retry = tracked(place, "failure", tags={**TAGS, "dagster.attempt": "1"})
    code, output = run_forked(retry)
    assert code == 0, output
    runs = runs_of(place, "failure")
    assert [(run.info.status, run.data.tags["dagster.attempt"]) for run in runs] == [("FAILED", "0"), ("FINISHED", "1")]


def test_stopped_training_is_killed_in_mlflow(place: Workplace) -> None:
    """The signal that a cancellation sends to the process."""
    process = start_trainer(tracked(place, "stopped"), env=pausing(place.folder / "pause-stopped"))
    wait_for_line(process, "Epoch 1/")
    # logged before the stop, so that only the end of the run has to be sent before the process ends
    wait_until(lambda: any("train_loss" in run.data.metrics for run in runs_of(place, "stopped")), "the first epoch")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == EXIT_RESUME, output
    assert [run.info.status for run in runs_of(place, "stopped")] == ["KILLED"]


def test_run_of_a_killed_process_is_closed_by_the_next_one(place: Workplace) -> None:
    """Kubernetes restarts the pod, and Dagster sees one job."""
    spec = tracked(place, "killed")
    process = fork_trainer(spec, pausing(place.folder / "pause-killed"))
    wait_until(lambda: runs_of(place, "killed") or not process.is_alive(), "the run to be opened")
    assert process.is_alive()
    process.kill()
    process.join()
    assert [run.info.status for run in runs_of(place, "killed")] == ["RUNNING"]
    process = fork_trainer(spec)
    process.join()
    assert process.exitcode == 0
    assert [run.info.status for run in runs_of(place, "killed")] == ["FAILED", "FINISHED"]


@pytest.fixture
def port() -> int:
    """An address where nothing listens."""
    return free_port()


def test_training_without_mlflow_names_what_was_not_logged(
    place: Workplace, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tracked(place, "away", tracking_uri=f"http://127.0.0.1:{port}", artifact_uri=None, patience_seconds=2)
    code, output = run_forked(spec)
    assert code == 0, output
    digest, _ = place.only_model("away")
    unsent = json_file(place.models("away"), f"{digest}/performance.json")["mlflow_unsent"]
    assert {"start of the run", "metrics of step 3", "model"} <= set(unsent)
    assert "Not sent to MLflow" in output


@contextmanager
def tracking_server(place: Workplace, port: int) -> Iterator[None]:
    """A real tracking server while the block runs."""
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{place.folder}/server.db"]
    command += ["--artifacts-destination", str(place.folder / "served"), "--serve-artifacts"]
    command += ["--port", str(port), "--workers", "1"]
    # its many job workers are not needed here
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
    try:
        yield
    finally:
        process.terminate()
        process.wait(120)


def test_mlflow_server_that_starts_late_gets_everything(place: Workplace, port: int) -> None:
    """Over HTTP, with artifacts proxied by the server."""
    uri = f"http://127.0.0.1:{port}"
    process = start_trainer(tracked(place, "late", tracking_uri=uri, artifact_uri=None))
    wait_for_line(process, "MLflow: start of the run failed and will be retried")
    with tracking_server(place, port):
        output, _ = process.communicate(timeout=500)
        assert process.returncode == 0, output
        check_what_was_sent(place, uri)


def check_what_was_sent(place: Workplace, uri: str) -> None:
    digest, metrics = place.only_model("late")
    assert json_file(place.models("late"), f"{digest}/performance.json")["mlflow_unsent"] == []
    client = MlflowClient(uri)
    (version,) = client.search_model_versions("name = 'late'")
    assert version.tags["model_digest"] == digest
    assert version.run_id is not None
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["test_loss"] == metrics["test_loss"]
    assert len(client.get_metric_history(version.run_id, "train_loss")) == 3
    assert len(client.list_artifacts(version.run_id, "model")) >= 8
