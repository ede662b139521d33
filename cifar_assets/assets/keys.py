"""Keys and groups of the assets, and the settings they all share."""

import dagster as dg

PREFIX = "cifar10"

RAW_DATASET = dg.AssetKey([PREFIX, "raw_dataset"])
PROCESSED_DATASET = dg.AssetKey([PREFIX, "processed_dataset"])
TRAINED_MODEL = dg.AssetKey([PREFIX, "trained_model"])
ARGO_TRAINED_MODEL = dg.AssetKey([PREFIX, "argo_trained_model"])
INFERENCE_SERVICE = dg.AssetKey([PREFIX, "inference_service"])
SERVED_TRAFFIC = dg.AssetKey([PREFIX, "served_traffic"])
PREDICTIONS = dg.AssetKey([PREFIX, "predictions"])

OWNERS = ["team:ml-platform"]
"""The owning team; replace it with yours."""

TRAINING_POOL = "training"
SERVING_POOL = "serving"
