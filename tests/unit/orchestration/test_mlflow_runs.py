"""MLflow runs that their trainer left RUNNING: who closes them, and with which status.

Dagster runs are real, in a temporary instance, and so is the SQLite store.
"""

import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from uuid import uuid4

import dagster as dg
import pytest
from dagster_postgres.utils import DagsterPostgresException
from mlflow import end_run, set_tracking_uri

from cifar_assets import sensors
from resources.errors import ConfigError
from resources.kubernetes.errors import ApiUnavailableError
from resources.mlflow.resource import RUN_ID_TAG, RUN_METADATA, LocalMlflow, MlflowResource, MlflowServer
from tests.fixtures.cifar10 import close_mlflow_runs


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> LocalMlflow:
    mlflow = LocalMlflow(path=str(tmp_path_factory.mktemp("mlflow")))
    mlflow.client().create_experiment(mlflow.experiment, mlflow.artifact_uri())
    return mlflow


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def start_run(mlflow: MlflowResource, dagster_run_id: str) -> str:
    """An MLflow run that was started as the trainer does."""
    client = mlflow.client()
    experiment = client.get_experiment_by_name(mlflow.experiment)
    assert experiment is not None
    return client.create_run(experiment.experiment_id, tags={RUN_ID_TAG: dagster_run_id}).info.run_id


def status(mlflow: MlflowResource, run_id: str) -> str:
    return mlflow.client().get_run(run_id).info.status


def tick(instance: dg.DagsterInstance, mlflow: MlflowResource) -> str:
    result = close_mlflow_runs(dg.build_sensor_context(instance=instance, resources={"mlflow": mlflow}))
    assert isinstance(result, dg.SkipReason)
    assert result.skip_message is not None
    return result.skip_message


def materialize(
    instance: dg.DagsterInstance, body: Callable[[dg.AssetExecutionContext], object], fail_after: bool = False
) -> dg.DagsterRun:
    """One Dagster run whose asset calls `body` and then, if requested, fails."""

    @dg.asset
    def model(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        return dg.MaterializeResult(metadata={RUN_METADATA: str(body(context))})

    @dg.asset(deps=[model])
    def later() -> None:
        if fail_after:
            raise dg.Failure("a check refuses the model")

    known = {run.run_id for run in instance.get_runs()}
    dg.materialize([model, later], instance=instance, raise_on_error=False)
    (run,) = [run for run in instance.get_runs() if run.run_id not in known]
    return run


@dg.job
def training() -> None: ...


def test_a_finished_training_is_finished_even_where_its_dagster_run_fails_later(
    instance: dg.DagsterInstance, mlflow: LocalMlflow
) -> None:
    left: list[str] = []

    def train(context: dg.AssetExecutionContext) -> str:
        left.append(start_run(mlflow, context.run.run_id))
        return left[-1]

    runs = [materialize(instance, train), materialize(instance, train, fail_after=True)]
    assert [run.status for run in runs] == [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE]
    said = tick(instance, mlflow)
    assert [status(mlflow, run_id) for run_id in left] == ["FINISHED", "FINISHED"]
    assert all(f"{run_id} as FINISHED" in said for run_id in left)
    assert "had ended: none" in tick(instance, mlflow)


def test_an_attempt_before_the_one_that_finished_failed(instance: dg.DagsterInstance, mlflow: LocalMlflow) -> None:
    left: list[str] = []

    def train(context: dg.AssetExecutionContext) -> str:
        left.append(start_run(mlflow, context.run.run_id))
        if context.retry_number == 0:
            raise dg.RetryRequested(max_retries=1)
        return left[-1]

    assert materialize(instance, train).status == dg.DagsterRunStatus.SUCCESS
    tick(instance, mlflow)
    assert [status(mlflow, run_id) for run_id in left] == ["FAILED", "FINISHED"]


def test_runs_end_as_their_dagster_runs_did_and_when(
    instance: dg.DagsterInstance, mlflow: LocalMlflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = {
        "FAILED": instance.create_run_for_job(training, status=dg.DagsterRunStatus.STARTED),
        "KILLED": instance.create_run_for_job(training, status=dg.DagsterRunStatus.STARTED),
    }
    left = {expected: start_run(mlflow, run.run_id) for expected, run in ended.items()}
    instance.report_run_failed(ended["FAILED"])
    instance.report_run_canceled(ended["KILLED"])
    tick(instance, mlflow)
    assert status(mlflow, left["FAILED"]) == "RUNNING", "a retry may adopt its training"
    monkeypatch.setattr(sensors, "ADOPTION_SECONDS", 0)
    tick(instance, mlflow)
    assert {expected: status(mlflow, run_id) for expected, run_id in left.items()} == {name: name for name in left}
    record = instance.get_run_record_by_id(ended["FAILED"].run_id)
    assert record is not None
    assert record.end_time is not None
    assert mlflow.client().get_run(left["FAILED"]).info.end_time == int(1000 * record.end_time)


def test_active_and_unknown_trainings_are_not_closed(
    instance: dg.DagsterInstance, mlflow: LocalMlflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A retry in progress may adopt the training of a failed run."""
    monkeypatch.setattr(sensors, "ADOPTION_SECONDS", 0)
    going = instance.create_run_for_job(training, status=dg.DagsterRunStatus.STARTED)
    failed = instance.create_run_for_job(training, status=dg.DagsterRunStatus.FAILURE)
    retry = instance.create_run_for_job(
        training,
        status=dg.DagsterRunStatus.STARTED,
        parent_run_id=failed.run_id,
        root_run_id=failed.run_id,
        tags={"dagster/root_run_id": failed.run_id, "dagster/parent_run_id": failed.run_id},
    )
    left = [start_run(mlflow, run_id) for run_id in (going.run_id, failed.run_id, "of-another-instance")]
    tick(instance, mlflow)
    assert {status(mlflow, run_id) for run_id in left} == {"RUNNING"}
    instance.report_run_failed(retry)
    tick(instance, mlflow)
    assert [status(mlflow, run_id) for run_id in left] == ["RUNNING", "FAILED", "RUNNING"]


def test_tick_reports_an_mlflow_outage_and_a_later_tick_closes_the_run(
    instance: dg.DagsterInstance, mlflow: LocalMlflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = instance.create_run_for_job(training, status=dg.DagsterRunStatus.CANCELED)
    left = start_run(mlflow, run.run_id)
    assert "http://127.0.0.1:1 did not respond" in tick(instance, MlflowServer(tracking_uri="http://127.0.0.1:1"))
    assert status(mlflow, left) == "RUNNING"
    tick(instance, mlflow)
    assert status(mlflow, left) == "KILLED"


def test_a_database_of_another_mlflow_is_named_with_the_command(
    instance: dg.DagsterInstance, mlflow: LocalMlflow, tmp_path: Path
) -> None:
    shutil.copy(Path(mlflow.path, "mlflow.db"), tmp_path)
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database, database:
        database.execute("update alembic_version set version_num = 'bf29a5ff90ea'")
    said = tick(instance, LocalMlflow(path=str(tmp_path)))
    assert "Nothing was closed." in said
    assert f"mlflow db upgrade sqlite:///{tmp_path}/mlflow.db" in said


def test_tick_without_mlflow_reports_it_and_creates_nothing(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    assert "No MLflow is configured" in tick(instance, MlflowServer(tracking_uri=""))
    assert "had ended: none" in tick(instance, LocalMlflow(path=str(tmp_path / "absent")))
    assert not (tmp_path / "absent").exists()


def test_dagster_mlflows_own_resource_joins_the_trainers_run(
    instance: dg.DagsterInstance, mlflow: LocalMlflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the tag: an op of the same Dagster run that uses it logs to the training's MLflow run."""
    from dagster_mlflow import mlflow_tracking

    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_ID"):  # it sets them for the whole process
        monkeypatch.setenv(name, "")

    @dg.op(required_resource_keys={"mlflow"})
    def note(context: dg.OpExecutionContext) -> None:
        context.resources.mlflow.log_metric("noted", 1.0)

    @dg.job(
        resource_defs={
            "mlflow": mlflow_tracking.configured(
                {"experiment_name": mlflow.experiment, "mlflow_tracking_uri": mlflow.uri}
            )
        }
    )
    def noting() -> None:
        note()

    run_id = str(uuid4())
    left = start_run(mlflow, run_id)
    try:
        assert noting.execute_in_process(instance=instance, run_id=run_id).success
    finally:
        end_run()
        set_tracking_uri("")
    assert mlflow.client().get_run(left).data.metrics == {"noted": 1.0}


def test_a_run_that_mlflow_refuses_to_close_is_named_and_holds_up_no_other(
    instance: dg.DagsterInstance, mlflow: LocalMlflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = instance.create_run_for_job(training, status=dg.DagsterRunStatus.CANCELED)
    left = [start_run(mlflow, run.run_id) for _ in range(3)]
    close = LocalMlflow.close_run

    def refuse_one(resource: LocalMlflow, run_id: str, *end: object) -> None:
        if run_id == left[1]:
            raise ConfigError("MLflow refused: not allowed")
        close(resource, run_id, *end)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(LocalMlflow, "close_run", refuse_one)
    said = tick(instance, mlflow)
    assert [status(mlflow, run_id) for run_id in left] == ["KILLED", "RUNNING", "KILLED"]
    assert f"{left[1]} (MLflow refused: not allowed)" in said


def test_a_tick_during_which_mlflow_goes_away_waits_for_it_once(
    instance: dg.DagsterInstance, mlflow: LocalMlflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = instance.create_run_for_job(training, status=dg.DagsterRunStatus.CANCELED)
    left = {start_run(mlflow, run.run_id) for _ in range(3)}
    tried: list[str] = []

    def time_out(_: LocalMlflow, run_id: str, *end: object) -> None:
        tried.append(run_id)
        raise ConnectionError("timed out")

    with monkeypatch.context() as patch:
        patch.setattr(LocalMlflow, "close_run", time_out)
        assert "and those after it (timed out)" in tick(instance, mlflow)
    assert len(tried) == 1
    tick(instance, mlflow)
    assert {status(mlflow, run_id) for run_id in left} == {"KILLED"}


def unwatched() -> dg.Failure:
    error = dg.Failure("no response from the API server")
    error.__cause__ = ApiUnavailableError("no response from the API server")
    return error


@pytest.mark.parametrize(
    ("error", "canceled", "expected"),
    [
        (dg.DagsterExecutionInterruptedError(), True, "KILLED"),
        (dg.DagsterExecutionInterruptedError(), False, "RUNNING"),
        (dg.Failure("the trainer died"), True, "KILLED"),
        (dg.Failure("the trainer died"), False, "FAILED"),
        (DagsterPostgresException("too many retries for DB connection"), False, "RUNNING"),
        (unwatched(), False, "RUNNING"),
        (unwatched(), True, "KILLED"),
    ],
)
def test_a_step_closes_what_its_trainer_left_but_not_a_training_that_continues(
    instance: dg.DagsterInstance, mlflow: LocalMlflow, error: BaseException, canceled: bool, expected: str
) -> None:
    left: list[str] = []
    another = start_run(mlflow, "of-another-instance")

    def train(context: dg.AssetExecutionContext) -> None:
        with mlflow.closing_open_runs(context):
            left.append(start_run(mlflow, context.run.run_id))
            if canceled:
                instance.report_run_canceling(context.run)
            raise error

    materialize(instance, train)
    assert [status(mlflow, run_id) for run_id in (*left, another)] == [expected, "RUNNING"]


def test_without_mlflow_a_trained_model_is_materialized_all_the_same() -> None:
    nowhere = MlflowServer(tracking_uri="")
    assert nowhere.run_link(None).value == "not tracked"
    assert "MLFLOW_TRACKING_URI is not set" in str(nowhere.run_link("1234").value)
