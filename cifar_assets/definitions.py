"""The code location: everything Dagster is shown."""

import warnings

import dagster as dg

from cifar_assets import jobs, sensors
from cifar_assets.assets.inference_service import inference_service
from cifar_assets.assets.processed_dataset import processed_dataset
from cifar_assets.assets.raw_dataset import raw_dataset
from cifar_assets.assets.trained_model import trained_model
from cifar_assets.checks.data import processed_dataset_checks, raw_dataset_checks
from cifar_assets.checks.model import trained_model_checks
from cifar_assets.checks.service import inference_service_checks
from cifar_assets.deployment import resources_for

with warnings.catch_warnings():
    # Links from assets to their source are marked as beta, with a warning for every asset at every start.
    warnings.simplefilter("ignore", dg.BetaWarning)
    assets = dg.with_source_code_references([raw_dataset, processed_dataset, trained_model, inference_service])

defs = dg.Definitions(
    assets=assets,
    asset_checks=[raw_dataset_checks, processed_dataset_checks, trained_model_checks, inference_service_checks],
    jobs=jobs.ALL,
    schedules=[jobs.verify_service_daily],
    sensors=sensors.ALL,
    resources=resources_for(),
)
