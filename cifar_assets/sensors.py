"""Sensors: retrain on landed data, close MLflow runs of dead Dagster runs, deploy models that passed their checks."""

import time
from datetime import UTC, datetime, timedelta

import dagster as dg

from cifar_assets.assets.binding import Body, bind
from cifar_assets.assets.keys import ARGO_TRAINED_MODEL, INFERENCE_SERVICE, TRAINED_MODEL, key_of
from cifar_assets.assets.record import UNFINISHED
from cifar_assets.data_set import DataSet
from cifar_assets.dataset.landing.zone import LandingRecord, scan_landing
from cifar_assets.landing_decision import LandingCursor, LastRun, Outcome, decide
from resources.dagster_private import BulkActionsFilter, BulkActionStatus
from resources.errors import ConfigError
from resources.mlflow.resource import RUN_METADATA, MlflowResource
from resources.object_store.resource import ObjectStoreResource

ADOPTION_SECONDS = 1200.0
"""How long the training of a failed run may continue so that a retry can adopt it, for example after the run worker was
evicted: the collector deletes the job after 15 minutes."""

RETRY_SECONDS = 600.0
"""How long to wait for the automatic retry of a failed run: the daemon, if it is running, starts it within seconds."""

_RUN_KEY_TAG = "dagster/run_key"
_ROOT_RUN_TAG = "dagster/root_run_id"
_UNFINISHED_BACKFILLS = [BulkActionStatus.REQUESTED, BulkActionStatus.CANCELING, BulkActionStatus.FAILING]


def build_sensors(data_set: DataSet) -> list[dg.SensorDefinition]:
    """The sensors of a data set."""

    def sensor(name: str, tick: Body, seconds: int, description: str, job: str | None = None) -> dg.SensorDefinition:
        return dg.sensor(
            name=data_set.named(name),
            job_name=job,
            minimum_interval_seconds=seconds,
            default_status=dg.DefaultSensorStatus.RUNNING,
            description=description,
        )(bind(tick, data_set))

    landing = "Starts one retrain run for each batch of landed objects; later ones wait for it to end."
    closing = "Ends MLflow runs that are still RUNNING though the Dagster run of their training has ended."
    deploying = dg.AutomationConditionSensorDefinition(
        data_set.named("deploy_when_trained"),
        target=dg.AssetSelection.assets(key_of(data_set, INFERENCE_SERVICE)),
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Deploys a newly trained model once its blocking checks passed, unless a run has already done so.",
    )
    return [
        sensor("landing_sensor", request_retraining, 30, landing, data_set.named("retrain")),
        sensor("close_mlflow_runs", close_mlflow_runs, 120, closing),
        deploying,
    ]


def request_retraining(
    data_set: DataSet, context: dg.SensorEvaluationContext, object_store: ObjectStoreResource
) -> dg.SensorResult:
    """One tick: list the landing prefix and request at most one run."""
    cursor, note = LandingCursor.load(context.cursor)
    raw, instance = object_store.raw, context.instance
    record = LandingRecord.load(raw)
    decision = decide(
        cursor,
        scan_landing(raw),
        busy=training_in_flight(instance, data_set),
        last=last_run(instance, cursor.run_key),
        read=record.read if record else None,
        name=data_set.named,
    )
    if decision.run_key is None:
        return dg.SensorResult(skip_reason=decision.reason + note)
    after = decision.cursor.model_dump_json()
    if known := last_run(instance, decision.run_key):  # Dagster silently skips a run key that was used before
        reason = f"Run {known.run_id} was already started for these objects by a tick whose cursor was not saved."
        return dg.SensorResult(skip_reason=reason, cursor=after)
    context.log.info(decision.reason + note)
    training = {"reuse": True, **data_set.retrain_config}
    request = dg.RunRequest(
        run_key=decision.run_key,
        run_config={"ops": {key_of(data_set, TRAINED_MODEL).to_python_identifier(): {"config": training}}},
        tags={"landing": decision.reason[:200]},
    )
    return dg.SensorResult(run_requests=[request], cursor=after)


def training_in_flight(instance: dg.DagsterInstance, data_set: DataSet) -> str | None:
    """Describes an unfinished run, however it was started, or backfill that will materialize a model; else None.

    Of this data set only. The data of another one can be prepared while a model trains; the trainings themselves wait
    for each other in the pool.
    """
    trained = {key_of(data_set, TRAINED_MODEL), key_of(data_set, ARGO_TRAINED_MODEL)}
    for run in instance.get_runs(dg.RunsFilter(statuses=UNFINISHED)):
        if _will_train(instance, run, trained):
            return f"run {run.run_id} ({run.job_name}, {run.status.value})"
    failed_lately = dg.RunsFilter(
        statuses=[dg.DagsterRunStatus.FAILURE], updated_after=datetime.now(UTC) - timedelta(seconds=RETRY_SECONDS)
    )
    for run in instance.get_runs(failed_lately):
        if run.is_complete_and_waiting_to_retry and run.remote_job_origin and _will_train(instance, run, trained):
            return f"the automatic retry of run {run.run_id}"
    for backfill in instance.get_backfills(BulkActionsFilter(statuses=_UNFINISHED_BACKFILLS)):
        if trained & set(backfill.asset_selection or ()):
            return f"backfill {backfill.backfill_id}"
    return None


def _will_train(instance: dg.DagsterInstance, run: dg.DagsterRun, trained: set[dg.AssetKey]) -> bool:
    """Whether the run plans to materialize one of these, according to the plan that Dagster stores with every run."""
    planned = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION_PLANNED)
    return any(entry.get_dagster_event().asset_key in trained for entry in planned)


def last_run(instance: dg.DagsterInstance, run_key: str | None) -> LastRun | None:
    """The newest run with this run key, including retries, and how it ended."""
    runs = instance.get_runs(dg.RunsFilter(tags={_RUN_KEY_TAG: run_key}), limit=1) if run_key else []
    if not runs:
        return None
    run = runs[0]
    outcomes: dict[dg.DagsterRunStatus, Outcome] = {
        dg.DagsterRunStatus.SUCCESS: "succeeded",
        dg.DagsterRunStatus.CANCELED: "canceled",
    }
    if run.status != dg.DagsterRunStatus.FAILURE:
        return LastRun(run.run_id, outcomes.get(run.status, "unfinished"))
    evaluations = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION)
    verdicts = [entry.get_dagster_event().asset_check_evaluation_data for entry in evaluations]
    refused = any(verdict.blocking and not verdict.passed for verdict in verdicts)
    return LastRun(run.run_id, "refused" if refused else "crashed")


def mlflow_end(
    instance: dg.DagsterInstance, mlflow_run_id: str, dagster_run_id: str
) -> tuple[str, float | None] | None:
    """How and when a training that MLflow shows as RUNNING ended, according to its Dagster run.

    FINISHED where a materialization names the MLflow run, otherwise KILLED or FAILED. None for a run of another
    instance, while the run or a retry is in progress, and shortly after a failure, when a retry may still adopt the
    training.
    """
    record = instance.get_run_record_by_id(dagster_run_id)
    if record is None:
        return None
    run = record.dagster_run
    records = [record, *instance.get_run_records(dg.RunsFilter(tags={_ROOT_RUN_TAG: run.root_run_id or run.run_id}))]
    if not all(each.dagster_run.is_finished for each in records):
        return None
    for each in records:
        for entry in instance.all_logs(each.dagster_run.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION):
            materialization = entry.asset_materialization
            link = materialization.metadata.get(RUN_METADATA) if materialization else None
            if link and mlflow_run_id in str(link.value):
                return "FINISHED", entry.timestamp
    if run.status == dg.DagsterRunStatus.CANCELED:
        return "KILLED", record.end_time
    last_end = max(each.end_time or 0.0 for each in records)
    if run.status == dg.DagsterRunStatus.FAILURE and time.time() - last_end < ADOPTION_SECONDS:
        return None
    return "FAILED", record.end_time


def close_mlflow_runs(data_set: DataSet, context: dg.SensorEvaluationContext, mlflow: MlflowResource) -> dg.SkipReason:
    """Of the data set's experiment. What a tick cannot close because MLflow is down is found again by the next."""
    try:
        running = mlflow.running()
    except ConfigError as error:
        return dg.SkipReason(f"Nothing was closed. {error}")
    except Exception as error:
        return dg.SkipReason(f"MLflow at {mlflow.uri} did not respond; the next tick tries again: {error}")
    closed, refused, num_left = [], [], 0
    for run_id, dagster_run_id in running.items():
        end = mlflow_end(context.instance, run_id, dagster_run_id)
        if end is None:
            num_left += 1
            continue
        try:
            mlflow.close_run(run_id, *end)
            closed.append(f"{run_id} as {end[0]}")
        except ConfigError as error:
            refused.append(f"{run_id} ({error})")
        except Exception as error:  # with MLflow down, each of the others would wait for its own timeout
            refused.append(f"{run_id} and those after it ({error})")
            break
    return dg.SkipReason(
        f"Closed because their Dagster runs had ended: {', '.join(closed) or 'none'}. "
        f"Not closed, to be retried by the next tick: {', '.join(refused) or 'none'}. "
        f"Still RUNNING because their Dagster runs are in progress, just failed or are unknown here: {num_left}."
    )
