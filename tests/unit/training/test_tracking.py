"""How a tracked run ends when MLflow refuses something or is away (case C12), on a real sqlite store."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from cifar_assets.training.spec import MlflowTarget
from cifar_assets.training.tracking import RunStatus, Tracker


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow")


def tracked(folder: Path, experiment: str, **target: object) -> tuple[Tracker, MlflowClient]:
    """A tracker of a run in an experiment of its own, with two epochs and a model of one file."""
    uri = f"sqlite:///{folder}/mlflow.db"
    values = {
        "tracking_uri": uri,
        "experiment": experiment,
        "artifact_uri": (folder / experiment).as_uri(),
        "registered_model": experiment,
    }
    tracker = Tracker(MlflowTarget.model_validate(values | target), experiment)
    tracker.start({"seed": 1})
    tracker.log_metrics({"train_loss": 2.0}, 1)
    tracker.log_metrics({"train_loss": 1.0}, 2)
    tracker.log_files({"card.md": b"a model"}, "model")
    tracker.register("model", {})
    return tracker, MlflowClient(uri)


def only_run(client: MlflowClient, experiment: str) -> Run:
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    (run,) = client.search_runs([found.experiment_id])
    return run


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_a_refused_registration_is_not_repeated_and_the_run_ends(folder: Path, status: RunStatus):
    experiment = f"refused-{status}"
    tracker, client = tracked(folder, experiment, registered_model="no/such/name")
    before = time.monotonic()
    assert tracker.close(status, patience_seconds=60) == ["model version"]
    assert time.monotonic() - before < 50
    run = only_run(client, experiment)
    assert (run.info.status, run.data.metrics) == (status, {"train_loss": 1.0})


def test_a_refused_metric_costs_none_of_what_follows(folder: Path):
    tracker, client = tracked(folder, "metric")
    tracker.log_metrics({"no: such\nname": 1.0}, 3)
    tracker.log_metrics({"train_loss": 0.5}, 4)
    assert tracker.close("FINISHED") == ["metrics of step 3"]
    run = only_run(client, "metric")
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"train_loss": 0.5})
    assert tracker.model_version == "1"


def test_artifacts_that_cannot_be_stored_leave_no_model_version_and_no_open_run(folder: Path):
    (folder / "full").write_text("a file where the store needs a folder")
    tracker, client = tracked(folder, "full")
    deadline = time.monotonic() + 60
    while tracker.run_id is None or len(client.get_run(tracker.run_id).data.metrics) == 0:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert tracker.close("FINISHED", patience_seconds=2) == ["artifacts model/", "model version"]
    assert only_run(client, "full").info.status == "FINISHED"
    assert client.search_model_versions("name = 'full'") == []


class RefusingArtifacts(BaseHTTPRequestHandler):
    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_error(403)


def test_refused_artifacts_are_not_repeated_and_leave_no_model_version(folder: Path):
    with ThreadingHTTPServer(("127.0.0.1", 0), RefusingArtifacts) as server:
        threading.Thread(target=server.serve_forever).start()
        tracker, client = tracked(folder, "forbidden", artifact_uri=f"http://127.0.0.1:{server.server_port}")
        before = time.monotonic()
        assert tracker.close("FINISHED", patience_seconds=60) == ["artifacts model/", "model version"]
        assert time.monotonic() - before < 50
        server.shutdown()
    assert only_run(client, "forbidden").info.status == "FINISHED"
    assert client.search_model_versions("name = 'forbidden'") == []


def test_with_mlflow_away_the_end_is_given_up_in_time(folder: Path):
    tracker, _ = tracked(folder, "away", tracking_uri="http://127.0.0.1:1", artifact_uri=None)
    before = time.monotonic()
    unsent = tracker.close("FINISHED", patience_seconds=1)
    assert time.monotonic() - before < 7
    assert unsent[0] == "start of the run"
    assert unsent[-1] == "end of the run as FINISHED"
