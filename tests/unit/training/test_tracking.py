"""Tracking when MLflow refuses a request: the error comes at once and says what to do."""

import logging
import shutil
import sqlite3
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from mlflow import MlflowClient

from cifar_assets.training.tracking import Tracker
from resources.errors import ConfigError
from resources.mlflow.resource import LocalMlflow, MlflowServer
from resources.mlflow.target import CA_VARIABLE, MlflowTarget, why_refused
from tests.fixtures.s3 import certificates_for_loopback
from tests.fixtures.workspace import wait_until

EXPERIMENT = "cifar10"
PATIENCE_SECONDS = 400.0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a database, which takes seconds to make."""
    folder = tmp_path_factory.mktemp("made")
    LocalMlflow(path=str(folder)).client().create_experiment(EXPERIMENT, (folder / "artifacts").as_uri())
    return folder


@pytest.fixture
def mlflow(made: Path, tmp_path: Path) -> LocalMlflow:
    shutil.copy(made / "mlflow.db", tmp_path)
    return LocalMlflow(path=str(tmp_path))


def start(uri: str, identity: str = "0" * 64) -> Tracker:
    target = MlflowTarget(tracking_uri=uri, experiment=EXPERIMENT, patience_seconds=PATIENCE_SECONDS)
    tracker = Tracker(target, identity)
    tracker.start({"recipe.epochs": 1})
    tracker.log("metrics of step 1", metrics={"train_loss": 1.0}, step=1)
    return tracker


def wait_for(text: str, caplog: pytest.LogCaptureFixture) -> None:
    wait_until(lambda: text in caplog.text, text)


def assert_said_and_not_waited_for(tracker: Tracker, expected: str, caplog: pytest.LogCaptureFixture) -> None:
    wait_for("was refused", caplog)
    assert expected in caplog.text
    before = time.monotonic()
    unsent = tracker.close("FINISHED")
    assert time.monotonic() - before < PATIENCE_SECONDS / 4
    assert {"start of the run", "metrics of step 1", "end of the run as FINISHED"} <= set(unsent)
    assert expected in caplog.messages[-1]


def experiment_id(mlflow: LocalMlflow) -> str:
    found = mlflow.client().get_experiment_by_name(EXPERIMENT)
    assert found is not None
    return found.experiment_id


def set_schema(mlflow: LocalMlflow, revision: str) -> str:
    """Gives the revision before."""
    with closing(sqlite3.connect(Path(mlflow.path, "mlflow.db"))) as database, database:
        (before,) = database.execute("select version_num from alembic_version").fetchone()
        database.execute("update alembic_version set version_num = ?", (revision,))
    return before


def test_a_run_left_open_is_failed_by_the_next_attempt_at_the_same_training(mlflow: LocalMlflow) -> None:
    left = {identity: start(mlflow.uri, identity * 64) for identity in "01"}
    wait_until(lambda: all(tracker.run_id for tracker in left.values()), "both runs to be open")
    assert start(mlflow.uri).close("FINISHED") == []
    status = {each.info.run_id: each.info.status for each in mlflow.client().search_runs([experiment_id(mlflow)])}
    assert [status.pop(left[identity].run_id or "") for identity in "01"] == ["FAILED", "RUNNING"]
    assert list(status.values()) == ["FINISHED"]


def test_a_deleted_experiment_is_named_with_the_command_that_restores_it(
    mlflow: LocalMlflow, caplog: pytest.LogCaptureFixture
) -> None:
    identity = experiment_id(mlflow)
    mlflow.client().delete_experiment(identity)
    command = f"MLFLOW_TRACKING_URI={mlflow.uri} mlflow experiments restore --experiment-id {identity}"
    assert_said_and_not_waited_for(start(mlflow.uri), command, caplog)


def test_an_experiment_restored_while_the_training_lasts_is_used(
    mlflow: LocalMlflow, caplog: pytest.LogCaptureFixture
) -> None:
    identity = experiment_id(mlflow)
    mlflow.client().delete_experiment(identity)
    tracker = start(mlflow.uri)
    wait_for("was refused", caplog)
    mlflow.client().restore_experiment(identity)
    wait_until(lambda: tracker.run_id, "the run to be open")
    assert tracker.close("FINISHED") == []
    assert tracker.run_id is not None
    assert mlflow.client().get_run(tracker.run_id).data.metrics == {"train_loss": 1.0}


@pytest.mark.parametrize("revision", ["bf29a5ff90ea", "ffffffffffff"], ids=["older", "newer"])
def test_a_database_of_another_mlflow_is_named_with_the_command_that_upgrades_it(
    mlflow: LocalMlflow, revision: str, caplog: pytest.LogCaptureFixture
) -> None:
    set_schema(mlflow, revision)
    assert_said_and_not_waited_for(start(mlflow.uri), f"mlflow db upgrade {mlflow.uri}", caplog)
    with pytest.raises(ConfigError, match="mlflow db upgrade sqlite:///"):
        mlflow.champion_digest()
    with pytest.raises(ConfigError, match="mlflow db upgrade sqlite:///"):
        mlflow.running()


def test_a_database_that_cannot_be_written_is_named(mlflow: LocalMlflow) -> None:
    """A simulated error of SQLite, because root can write any file."""
    with (
        closing(sqlite3.connect(f"file:{mlflow.path}/mlflow.db?mode=ro", uri=True)) as database,
        pytest.raises(sqlite3.OperationalError) as refused,
    ):
        database.execute("delete from runs")
    assert "write permission to the database file" in (why_refused(refused.value, mlflow.uri) or "")


def test_a_file_that_is_not_a_database_is_named(mlflow: LocalMlflow, caplog: pytest.LogCaptureFixture) -> None:
    Path(mlflow.path, "mlflow.db").write_bytes(b"not a database" * 100)
    assert_said_and_not_waited_for(start(mlflow.uri), "Move the file away", caplog)


@pytest.mark.parametrize("uri", ["mlflow.svc:5000", "ftp://mlflow"])
def test_address_of_an_unknown_kind_is_named(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    assert_said_and_not_waited_for(start(uri), "Set MLFLOW_TRACKING_URI to a URI such as", caplog)


@pytest.fixture
def answer() -> Iterator[tuple[str, dict[str, object]]]:
    """A server with one answer to all requests, and that answer."""
    wanted: dict[str, object] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(int(str(wanted["status"])))
            body = str(wanted["body"]).encode()
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815

        def log_message(self, format: str, *arguments: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", wanted
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (401, "who are you", "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        (403, "not you", "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        (404, "no such page", "is not an MLflow server, or has another version"),
        (405, "", "is not an MLflow server, or has another version"),
        (200, "<html>hello</html>", "is not an MLflow server, or has another version"),
        (501, "", "is not an MLflow server, or has another version"),
    ],
)
def test_an_answer_that_waiting_does_not_change_is_a_refusal(
    answer: tuple[str, dict[str, object]], status: int, body: str, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    uri, wanted = answer
    wanted.update(status=status, body=body)
    assert_said_and_not_waited_for(start(uri), expected, caplog)
    with pytest.raises(ConfigError, match=expected):
        MlflowServer(tracking_uri=uri).champion_digest()


@pytest.mark.parametrize("bundle", [None, "/no/such/bundle"])
def test_an_untrusted_certificate_is_named_with_the_variable_that_helps(
    bundle: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    certificates = certificates_for_loopback(tmp_path / "certificates")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "public.crt", certificates / "private.key")
    if bundle:
        monkeypatch.setenv(CA_VARIABLE, bundle)
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        expected = f"Set {CA_VARIABLE} to a file with the certificate authority"
        assert_said_and_not_waited_for(start(f"https://127.0.0.1:{server.server_port}"), expected, caplog)
        server.shutdown()


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_an_answer_that_may_change_is_waited_for(
    answer: tuple[str, dict[str, object]], status: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    uri, wanted = answer
    wanted.update(status=status, body="busy")
    tracker = start(uri)
    wait_for("failed and will be retried", caplog)
    before = time.monotonic()
    assert tracker.close("FINISHED", patience_seconds=1.5)
    assert time.monotonic() - before >= 1.4
    assert "was refused" not in caplog.text


def test_a_refusal_after_the_run_was_opened_holds_up_nothing_else(
    mlflow: LocalMlflow, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = start(mlflow.uri)
    tracker.log("tags", tags={"": "a tag without a name"})
    tracker.log("metrics of step 2", metrics={"train_loss": 0.5}, step=2)
    assert tracker.close("FINISHED") == ["tags"]
    assert tracker.run_id is not None
    run = MlflowClient(mlflow.uri).get_run(tracker.run_id)
    assert (run.info.status, run.data.metrics["train_loss"]) == ("FINISHED", 0.5)
