"""Sensors: retrain on landed data, close what dead runs left open, deploy what passed its checks."""

import json
import os
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import dagster as dg
from pydantic import BaseModel, ConfigDict

from cifar_assets.assets.keys import TRAINED_MODEL
from cifar_assets.contracts import LANDING_PREFIX
from cifar_assets.dataset.landing import LandingScan, scan_landing
from cifar_assets.digests import sha256_json
from cifar_assets.errors import ConfigError
from cifar_assets.jobs import retrain
from cifar_assets.object_store import ObjectInfo
from resources.mlflow import RUN_METADATA, MlflowResource
from resources.object_store import ObjectStoreResource

RETRAIN_CONFIG_VARIABLE = "RETRAIN_CONFIG"
"""Holds, as JSON, the config of trained_model for runs started by the landing sensor: recipe, overrides, scale."""

MAX_ATTEMPTS = 3
"""How often one batch of arrivals is trained on when runs crash, the first time included."""

ADOPTION_SECONDS = 1200.0
"""How long a failed run's training may go on for a retry to adopt it: until the job's collector, after 15 minutes, has
deleted it. An evicted run worker fails its run, for one."""

_FINGERPRINT_CHARS = 16
_RUN_KEY_TAG = "dagster/run_key"
_ROOT_RUN_TAG = "dagster/root_run_id"
_IN_FLIGHT = [
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


class LandingCursor(BaseModel):
    """What the sensor remembers: fingerprints of the objects that the last requested run covers, and that run's key.

    Fingerprints (of key, etag and size) instead of keys keep it small with thousands of objects. They are replaced only
    when a run is requested: an object that is removed and put back meanwhile is not new.
    """

    model_config = ConfigDict(extra="ignore")

    covered: list[str] = []
    sequence: int = 0
    attempt: int = 0
    run_key: str | None = None


@dataclass(frozen=True)
class Decision:
    """Either a request (run key and the cursor to save with it) or the reason for none."""

    cursor: LandingCursor
    run_key: str | None
    reason: str


def fingerprint(info: ObjectInfo) -> str:
    """Identity of one state of an object. Time stamps are left out: stores disagree on them."""
    return sha256_json([info.key, info.etag, info.size])[:_FINGERPRINT_CHARS]


def decide(cursor: LandingCursor, scan: LandingScan, *, busy_run_id: str | None, repeat_last: bool) -> Decision:
    """Whether to retrain now. Pure: the same cursor and listing give the same run key, so that a replay adds no run."""
    ready = {fingerprint(info) for info in scan.ready}
    num_new = len(ready - set(cursor.covered))
    retry = not num_new and repeat_last and cursor.attempt < MAX_ATTEMPTS and bool(ready)
    notes = "".join(f" Skipped {count}: {reason}." for reason, count in sorted(Counter(scan.skipped.values()).items()))
    if not num_new and not retry:
        return Decision(cursor, None, f"No new data under {LANDING_PREFIX}.{notes}")
    if busy_run_id:
        return Decision(cursor, None, f"{num_new} new objects wait for run {busy_run_id} to end.{notes}")
    sequence = cursor.sequence + 1
    covered = sorted(ready)
    run_key = f"landing-{sequence}-{sha256_json(covered)[:12]}"
    after = LandingCursor(
        covered=covered, sequence=sequence, attempt=cursor.attempt + 1 if retry else 1, run_key=run_key
    )
    what = f"attempt {after.attempt} after a failed run" if retry else f"{num_new} new objects"
    return Decision(after, run_key, f"Retraining: {what}.{notes}")


@dg.sensor(
    job=retrain,
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Starts one retrain run for each batch of objects that landed; arrivals meanwhile wait for it to end.",
)
def landing_sensor(context: dg.SensorEvaluationContext, object_store: ObjectStoreResource) -> dg.SensorResult:
    """One tick: list the landing prefix and request at most one run."""
    cursor = LandingCursor.model_validate_json(context.cursor) if context.cursor else LandingCursor()
    decision = decide(
        cursor,
        scan_landing(object_store.raw),
        busy_run_id=_run_in_flight(context.instance),
        repeat_last=is_worth_repeating(context.instance, cursor.run_key),
    )
    if decision.run_key is None:
        return dg.SensorResult(skip_reason=decision.reason)
    context.log.info(decision.reason)
    request = dg.RunRequest(
        run_key=decision.run_key,
        run_config={"ops": {TRAINED_MODEL.to_python_identifier(): {"config": retrain_config(os.environ)}}},
        tags={"landing": decision.reason[:200]},
    )
    return dg.SensorResult(run_requests=[request], cursor=decision.cursor.model_dump_json())


def retrain_config(environment: Mapping[str, str]) -> dict[str, Any]:
    """Config of trained_model for runs that the sensor starts. ConfigError when RETRAIN_CONFIG is no JSON object."""
    text = environment.get(RETRAIN_CONFIG_VARIABLE) or "{}"
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{RETRAIN_CONFIG_VARIABLE} is no JSON: {error}. Got {text!r}.") from error
    if not isinstance(config, dict):
        raise ConfigError(f'{RETRAIN_CONFIG_VARIABLE} is {text!r}: expected an object such as {{"recipe": "fast"}}.')
    return {"reuse": True, **config}


def _run_in_flight(instance: dg.DagsterInstance) -> str | None:
    """Any unfinished run that trains, whichever way it was started."""
    records = instance.get_run_records(dg.RunsFilter(statuses=_IN_FLIGHT))
    for record in records:
        run = record.dagster_run
        selection = run.asset_selection
        if run.job_name == retrain.name or (selection and TRAINED_MODEL in selection):
            return run.run_id
    return None


def is_worth_repeating(instance: dg.DagsterInstance, run_key: str | None) -> bool:
    """Whether the newest run of this key, retries included, failed by something else than a blocking check.

    The same objects give the same dataset and, with the same seed, the same model, and so the same verdict.
    """
    runs = instance.get_runs(dg.RunsFilter(tags={_RUN_KEY_TAG: run_key}), limit=1) if run_key else []
    if not runs or runs[0].status != dg.DagsterRunStatus.FAILURE:
        return False
    evaluations = instance.all_logs(runs[0].run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION)
    verdicts = [entry.get_dagster_event().asset_check_evaluation_data for entry in evaluations]
    return all(verdict.passed or not verdict.blocking for verdict in verdicts)


def mlflow_end(
    instance: dg.DagsterInstance, mlflow_run_id: str, dagster_run_id: str
) -> tuple[str, float | None] | None:
    """How and when a training ended that MLflow shows as RUNNING, by what Dagster knows of its run.

    A materialization that names the MLflow run says that it finished, whatever became of the Dagster run after it; one
    that names another says that this was an attempt before. None while the Dagster run goes on, or a retry of it, which
    may have adopted the training, or may soon after a failure; and for a run that this instance does not know, as it
    may be another instance's.
    """
    record = instance.get_run_record_by_id(dagster_run_id)
    if record is None:
        return None
    run = record.dagster_run
    root = dg.RunsFilter(tags={_ROOT_RUN_TAG: run.root_run_id or run.run_id})
    records = {each.dagster_run.run_id: each for each in (record, *instance.get_run_records(root))}
    if not all(each.dagster_run.is_finished for each in records.values()):
        return None
    trained = False
    for run_id in records:
        for entry in instance.all_logs(run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION):
            materialization = entry.asset_materialization
            link = materialization.metadata.get(RUN_METADATA) if materialization else None
            if link and mlflow_run_id in str(link.value):
                return "FINISHED", entry.timestamp
            trained = trained or link is not None
    if run.status == dg.DagsterRunStatus.CANCELED:
        return "KILLED", record.end_time
    last_end = max(each.end_time or 0.0 for each in records.values())
    if run.status == dg.DagsterRunStatus.FAILURE and time.time() - last_end < ADOPTION_SECONDS:
        return None
    finished = run.status == dg.DagsterRunStatus.SUCCESS and not trained
    return "FINISHED" if finished else "FAILED", record.end_time


@dg.sensor(
    minimum_interval_seconds=120,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Ends MLflow runs that are still RUNNING though the Dagster run of their training has ended.",
)
def close_mlflow_runs(context: dg.SensorEvaluationContext, mlflow: MlflowResource) -> dg.SkipReason:
    """Nothing stays RUNNING in MLflow: what a tick cannot close, as MLflow is away, the next one finds again."""
    from mlflow.exceptions import MlflowException

    try:
        running = mlflow.running()
    except ConfigError as error:
        return dg.SkipReason(str(error))
    except MlflowException as error:
        return dg.SkipReason(f"MLflow at {mlflow.uri} did not answer; the next tick asks again: {error}")
    closed: list[str] = []
    refused: list[str] = []
    for run_id, dagster_run_id in running.items():
        if end := mlflow_end(context.instance, run_id, dagster_run_id):
            try:
                mlflow.close_run(run_id, *end)
                closed.append(f"{run_id} as {end[0]}")
            except MlflowException as error:
                refused.append(f"{run_id} ({error})")
                if error.get_http_status_code() >= 500:
                    break  # away, and not only unwilling: each further call would take its time to fail
    num_left = len(running) - len(closed) - len(refused)
    reason = f"Still RUNNING, as their Dagster runs go on, failed just now or are not known here: {num_left}."
    if refused:
        reason += f" Not closed, and tried again by the next tick: {', '.join(refused)}."
    if closed:
        context.log.warning(f"Closed in MLflow, as their Dagster runs had ended: {', '.join(closed)}")
    return dg.SkipReason(f"{reason} Closed: {', '.join(closed) or 'none'}.")


deploy_when_trained = dg.AutomationConditionSensorDefinition(
    "deploy_when_trained",
    target=dg.AssetSelection.groups("serving"),
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Deploys a newly trained model once its blocking checks passed, when no run has done so already.",
)

ALL = [landing_sensor, close_mlflow_runs, deploy_when_trained]
