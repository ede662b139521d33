"""The jobs a person or a sensor starts."""

import dagster as dg

from cifar_assets.assets.keys import (
    ARGO_TRAINED_MODEL,
    INFERENCE_SERVICE,
    PROCESSED_DATASET,
    RAW_DATASET,
    TRAINED_MODEL,
)

_DATA = dg.AssetSelection.assets(RAW_DATASET, PROCESSED_DATASET)
_MODEL = dg.AssetSelection.assets(TRAINED_MODEL)
_SERVICE = dg.AssetSelection.assets(INFERENCE_SERVICE)

retrain = dg.define_asset_job(
    "retrain", _DATA | _MODEL | _SERVICE, description="From the source and everything landed to a served model."
)
train = dg.define_asset_job("train", _DATA | _MODEL, description="Like retrain, without deploying.")
deploy = dg.define_asset_job(
    "deploy", _SERVICE, description="Serve the last trained model, or model_digest, if the gate passes it."
)
rollback = dg.define_asset_job(
    "rollback",
    _SERVICE,
    description="Serve again what was served before the current model, if the gate passes it.",
    config={"ops": {INFERENCE_SERVICE.to_python_identifier(): {"config": {"rollback": True}}}},
)
argo_parity = dg.define_asset_job(
    "argo_parity",
    dg.AssetSelection.assets(ARGO_TRAINED_MODEL),
    description="Train the last model once more by the Argo workflow, and compare the two.",
)
verify_service = dg.define_asset_job(
    "verify_service",
    dg.AssetSelection.checks_for_assets(INFERENCE_SERVICE),
    description="Ask the running service whether it still serves the right model, and how fast.",
)


@dg.schedule(
    job=verify_service,
    cron_schedule="0 6 * * *",
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Checks every morning whether the running service still serves the right model, and how fast.",
)
def verify_service_daily(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
    """One run a day, once a model has been served."""
    if context.instance.get_latest_materialization_event(INFERENCE_SERVICE) is None:
        return dg.SkipReason(f"{INFERENCE_SERVICE.to_user_string()} has not been materialized yet.")
    return dg.RunRequest()


ALL = [retrain, train, deploy, rollback, argo_parity, verify_service]
