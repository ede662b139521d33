"""Names and keys of the assets, and the settings they all share."""

import dagster as dg

from cifar_assets.data_set import DataSet

RAW_DATASET = "raw_dataset"
PROCESSED_DATASET = "processed_dataset"
TRAINED_MODEL = "trained_model"
ARGO_TRAINED_MODEL = "argo_trained_model"
INFERENCE_SERVICE = "inference_service"
PREDICTIONS = "predictions"
SERVED_TRAFFIC = "served_traffic"
PICTURES_TO_LABEL = "pictures_to_label"
SEED_STUDY = "seed_study"
"""Not in the graph: the job of this name records its trainings under it."""

OWNERS = ["team:ml-platform"]
"""The owning team; replace it with yours."""

TRAINING_POOL = "training"
"""Shared by all data sets: they train one after the other."""
SERVING_POOL = "serving"


def key_of(data_set: DataSet, asset: str) -> dg.AssetKey:
    """The key of a data set's asset."""
    return dg.AssetKey([data_set.name, asset])
