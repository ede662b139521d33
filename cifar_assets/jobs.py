"""The jobs a person or a sensor starts, and their schedules."""

from typing import Any

import dagster as dg

from cifar_assets.assets.keys import (
    ARGO_TRAINED_MODEL,
    INFERENCE_SERVICE,
    PREDICTIONS,
    PROCESSED_DATASET,
    RAW_DATASET,
    SERVED_TRAFFIC,
    TRAINED_MODEL,
    key_of,
)
from cifar_assets.data_set import DataSet
from cifar_assets.settings import read_settings


def build_jobs(data_set: DataSet) -> tuple[list[Any], list[dg.ScheduleDefinition]]:
    """The jobs and schedules of a data set."""
    service = key_of(data_set, INFERENCE_SERVICE)
    data = _selected(data_set, RAW_DATASET, PROCESSED_DATASET)
    model, served = _selected(data_set, TRAINED_MODEL), _selected(data_set, INFERENCE_SERVICE)
    retrain = dg.define_asset_job(
        data_set.named("retrain"),
        data | model | served,
        description="Builds the datasets, trains a model and serves it.",
    )
    verify_service = dg.define_asset_job(
        data_set.named("verify_service"),
        dg.AssetSelection.checks_for_assets(service),
        description="Checks whether the running service still serves the right model, and how fast.",
    )
    watch_traffic = dg.define_asset_job(
        data_set.named("watch_traffic"),
        _selected(data_set, SERVED_TRAFFIC),
        description="Summarizes the recorded traffic of the last day and checks it for drift.",
    )
    jobs = [
        retrain,
        dg.define_asset_job(
            data_set.named("train"), data | model, description="Like retrain, but does not deploy the model."
        ),
        dg.define_asset_job(
            data_set.named("deploy"),
            served,
            description="Serves the last trained model, or model_digest, if the gate passes it.",
        ),
        dg.define_asset_job(
            data_set.named("rollback"),
            served,
            description="Serves the model that was served before the current one, if the gate passes it.",
            config={"ops": {service.to_python_identifier(): {"config": {"rollback": True}}}},
        ),
        verify_service,
        watch_traffic,
        dg.define_asset_job(
            data_set.named("predict"),
            _selected(data_set, PREDICTIONS),
            description="Classifies the pictures of a folder or prefix, which the config has to name, with the served "
            "model.",
        ),
    ]
    if data_set.is_default:
        argo_parity = dg.define_asset_job(
            "argo_parity",
            _selected(data_set, ARGO_TRAINED_MODEL),
            description="Trains the last model again with the Argo workflow and compares the two.",
        )
        jobs.append(argo_parity)
    schedules = [
        _verify_daily(data_set.named("verify_service_daily"), verify_service.name, service),
        _watch_daily(data_set.named("watch_traffic_daily"), watch_traffic.name),
    ]
    return jobs, schedules


def _selected(data_set: DataSet, *assets: str) -> dg.AssetSelection:
    return dg.AssetSelection.assets(*(key_of(data_set, asset) for asset in assets))


def _verify_daily(name: str, job: str, service: dg.AssetKey) -> dg.ScheduleDefinition:
    @dg.schedule(
        name=name,
        job_name=job,
        cron_schedule="0 6 * * *",
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description="Checks every morning whether the running service still serves the right model, and how fast.",
    )
    def verify_daily(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        """Requests one run a day after the first model has been served."""
        if context.instance.get_latest_materialization_event(service) is None:
            return dg.SkipReason(f"{service.to_user_string()} has not been materialized yet.")
        return dg.RunRequest()

    return verify_daily


def _watch_daily(name: str, job: str) -> dg.ScheduleDefinition:
    @dg.schedule(
        name=name,
        job_name=job,
        cron_schedule="30 6 * * *",
        execution_timezone="UTC",
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description="Summarizes the recorded traffic every morning and checks it for drift.",
    )
    def watch_daily() -> dg.RunRequest | dg.SkipReason:
        """Requests one run a day if traffic is recorded."""
        return dg.RunRequest() if read_settings().recorded_fraction else dg.SkipReason("RECORDED_FRACTION is 0.")

    return watch_daily
