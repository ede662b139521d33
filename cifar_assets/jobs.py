"""The jobs a person or a sensor starts."""

import dagster as dg

from cifar_assets.assets.keys import (
    ARGO_TRAINED_MODEL,
    INFERENCE_SERVICE,
    PREDICTIONS,
    PROCESSED_DATASET,
    RAW_DATASET,
    SERVED_TRAFFIC,
    TRAINED_MODEL,
)
from cifar_assets.settings import read_settings

_DATA = dg.AssetSelection.assets(RAW_DATASET, PROCESSED_DATASET)
_MODEL = dg.AssetSelection.assets(TRAINED_MODEL)
_SERVICE = dg.AssetSelection.assets(INFERENCE_SERVICE)

retrain = dg.define_asset_job(
    "retrain", _DATA | _MODEL | _SERVICE, description="Builds the datasets, trains a model and serves it."
)
train = dg.define_asset_job("train", _DATA | _MODEL, description="Like retrain, but does not deploy the model.")
deploy = dg.define_asset_job(
    "deploy", _SERVICE, description="Serves the last trained model, or model_digest, if the gate passes it."
)
rollback = dg.define_asset_job(
    "rollback",
    _SERVICE,
    description="Serves the model that was served before the current one, if the gate passes it.",
    config={"ops": {INFERENCE_SERVICE.to_python_identifier(): {"config": {"rollback": True}}}},
)
argo_parity = dg.define_asset_job(
    "argo_parity",
    dg.AssetSelection.assets(ARGO_TRAINED_MODEL),
    description="Trains the last model again with the Argo workflow and compares the two.",
)
verify_service = dg.define_asset_job(
    "verify_service",
    dg.AssetSelection.checks_for_assets(INFERENCE_SERVICE),
    description="Checks whether the running service still serves the right model, and how fast.",
)


@dg.schedule(
    job=verify_service,
    cron_schedule="0 6 * * *",
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Checks every morning whether the running service still serves the right model, and how fast.",
)
def verify_service_daily(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
    """Requests one run a day after the first model has been served."""
    if context.instance.get_latest_materialization_event(INFERENCE_SERVICE) is None:
        return dg.SkipReason(f"{INFERENCE_SERVICE.to_user_string()} has not been materialized yet.")
    return dg.RunRequest()


watch_traffic = dg.define_asset_job(
    "watch_traffic",
    dg.AssetSelection.assets(SERVED_TRAFFIC),
    description="Summarizes the recorded traffic of the last day and checks it for drift.",
)


@dg.schedule(
    job=watch_traffic,
    cron_schedule="30 6 * * *",
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Summarizes the recorded traffic every morning and checks it for drift.",
)
def watch_traffic_daily() -> dg.RunRequest | dg.SkipReason:
    """Requests one run a day if traffic is recorded."""
    return dg.RunRequest() if read_settings().recorded_fraction else dg.SkipReason("RECORDED_FRACTION is 0.")


predict = dg.define_asset_job(
    "predict",
    dg.AssetSelection.assets(PREDICTIONS),
    description="Classifies the pictures of a folder or prefix, which the config has to name, with the served model.",
)

ALL = [retrain, train, deploy, rollback, argo_parity, verify_service, watch_traffic, predict]
