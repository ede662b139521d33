"""The jobs a person or a sensor starts, and their schedules."""

from collections.abc import Callable
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


def build_jobs(data_set: DataSet) -> list[Any]:
    """The jobs of a data set."""
    service = key_of(data_set, INFERENCE_SERVICE)
    data = _selected(data_set, RAW_DATASET, PROCESSED_DATASET)
    model, served = _selected(data_set, TRAINED_MODEL), _selected(data_set, INFERENCE_SERVICE)

    def job(name: str, selection: dg.AssetSelection, description: str, **options: Any) -> Any:
        return dg.define_asset_job(data_set.named(name), selection, description=description, **options)

    jobs = [
        job("retrain", data | model | served, "Builds the datasets, trains a model and serves it."),
        job("train", data | model, "Like retrain, but does not deploy the model."),
        job("deploy", served, "Serves the last trained model, or model_digest, if the gate passes it."),
        job(
            "rollback",
            served,
            "Serves the model that was served before the current one, if the gate passes it.",
            config={"ops": {service.to_python_identifier(): {"config": {"rollback": True}}}},
        ),
        job(
            "verify_service",
            dg.AssetSelection.checks_for_assets(service),
            "Checks whether the running service still serves the right model, and how fast.",
        ),
        job(
            "watch_traffic",
            _selected(data_set, SERVED_TRAFFIC),
            "Summarizes the recorded traffic of the last day and checks it for drift.",
        ),
        job(
            "predict",
            _selected(data_set, PREDICTIONS),
            "Classifies the pictures of a folder or prefix, which the config has to name, with the served model.",
        ),
    ]
    if data_set.is_default:
        what = "Trains the last model again with the Argo workflow and compares the two."
        jobs.append(job("argo_parity", _selected(data_set, ARGO_TRAINED_MODEL), what))
    return jobs


def build_schedules(data_set: DataSet) -> list[dg.ScheduleDefinition]:
    """The daily schedules of a data set's jobs."""
    service = key_of(data_set, INFERENCE_SERVICE)

    def daily(
        job: str, cron: str, description: str, why_not: Callable[[dg.ScheduleEvaluationContext], str | None]
    ) -> dg.ScheduleDefinition:
        @dg.schedule(
            name=data_set.named(f"{job}_daily"),
            job_name=data_set.named(job),
            cron_schedule=cron,
            execution_timezone="UTC",
            default_status=dg.DefaultScheduleStatus.RUNNING,
            description=description,
        )
        def schedule(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
            reason = why_not(context)
            return dg.SkipReason(reason) if reason else dg.RunRequest()

        return schedule

    def why_not_verify(context: dg.ScheduleEvaluationContext) -> str | None:
        made = context.instance.get_latest_materialization_event(service)
        return None if made else f"{service.to_user_string()} has not been materialized yet."

    def why_not_watch(_: dg.ScheduleEvaluationContext) -> str | None:
        return None if read_settings().recorded_fraction else "RECORDED_FRACTION is 0."

    verify = "Checks every morning whether the running service still serves the right model, and how fast."
    watch = "Summarizes the recorded traffic every morning and checks it for drift."
    return [
        daily("verify_service", "0 6 * * *", verify, why_not_verify),
        daily("watch_traffic", "30 6 * * *", watch, why_not_watch),
    ]


def _selected(data_set: DataSet, *assets: str) -> dg.AssetSelection:
    return dg.AssetSelection.assets(*(key_of(data_set, asset) for asset in assets))
