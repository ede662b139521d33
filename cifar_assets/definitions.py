"""The Dagster code location."""

import warnings

import dagster as dg

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
from cifar_assets.data_set import DataSet, read_data_sets
from cifar_assets.deployment import executor_for, resources_for, sensors_for
from cifar_assets.jobs import build_jobs, build_schedules
from cifar_assets.prune.run import build_prune_job
from cifar_assets.seed_study.job import build_seed_study
from cifar_assets.sensors import build_sensors
from cifar_assets.settings import read_settings

# Some Dagster APIs used here are in beta or preview and would warn in every process of every run.
warnings.filterwarnings("ignore", category=dg.BetaWarning)
warnings.filterwarnings("ignore", category=dg.PreviewWarning)

ASSETS = [
    raw_dataset,
    processed_dataset,
    trained_model,
    inference_service,
    predictions,
    served_traffic,
    pictures_to_label,
]
CHECKS = [
    raw_dataset_checks,
    processed_dataset_checks,
    trained_model_checks,
    inference_service_checks,
    served_traffic_checks,
]


def build_definitions(data_set: DataSet) -> dg.Definitions:
    """The definitions of one data set, without their resources."""
    prune_job, prune_weekly = build_prune_job(data_set)
    # the Argo workflow knows only the default data set
    argo = ([argo_trained_model], [argo_parity_checks]) if data_set.is_default else ([], [])
    return dg.Definitions(
        assets=dg.with_source_code_references([build(data_set) for build in (*ASSETS, *argo[0])]),
        asset_checks=[build(data_set) for build in (*CHECKS, *argo[1])],
        jobs=[*build_jobs(data_set), prune_job, build_seed_study(data_set)],
        schedules=[*build_schedules(data_set), prune_weekly],
        sensors=build_sensors(data_set),
    )


_settings = read_settings()
_data_sets = read_data_sets(_settings)
defs = dg.Definitions.merge(
    *map(build_definitions, _data_sets),
    dg.Definitions(
        sensors=sensors_for(_settings),
        resources=resources_for(_settings, _data_sets),
        executor=executor_for(_settings),
    ),
)
