"""The Dagster code location."""

import warnings

import dagster as dg

from cifar_assets import jobs, sensors
from cifar_assets.assets.datasets import processed_dataset, raw_dataset
from cifar_assets.assets.inference_service import inference_service
from cifar_assets.assets.pictures_to_label import pictures_to_label
from cifar_assets.assets.predictions import predictions
from cifar_assets.assets.served_traffic import served_traffic
from cifar_assets.assets.trained_model import argo_trained_model, trained_model
from cifar_assets.checks.data import processed_dataset_checks, raw_dataset_checks
from cifar_assets.checks.drift import served_traffic_checks
from cifar_assets.checks.model import trained_model_checks
from cifar_assets.checks.parity import argo_parity_checks
from cifar_assets.checks.service import inference_service_checks
from cifar_assets.deployment import executor_for, resources_for, sensors_for
from cifar_assets.prune.run import prune_job, prune_weekly
from cifar_assets.settings import read_settings

# Some Dagster APIs used here are in beta or preview and would warn in every process of every run.
warnings.filterwarnings("ignore", category=dg.BetaWarning)
warnings.filterwarnings("ignore", category=dg.PreviewWarning)

_settings = read_settings()
defs = dg.Definitions(
    assets=dg.with_source_code_references(
        [
            raw_dataset,
            processed_dataset,
            trained_model,
            inference_service,
            argo_trained_model,
            served_traffic,
            pictures_to_label,
            predictions,
        ]
    ),
    asset_checks=[
        raw_dataset_checks,
        processed_dataset_checks,
        trained_model_checks,
        inference_service_checks,
        argo_parity_checks,
        served_traffic_checks,
    ],
    jobs=[*jobs.ALL, prune_job],
    schedules=[jobs.verify_service_daily, jobs.watch_traffic_daily, prune_weekly],
    sensors=[*sensors.ALL, *sensors_for(_settings)],
    resources=resources_for(_settings),
    executor=executor_for(_settings),
)
