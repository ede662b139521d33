"""Names that more than one process relies on: buckets, key layouts, classes, model name.

Everything here is part of a contract with stored data or with a remote process: a change is a migration.
"""

CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
"""Class names in label order, as in the official archive's batches.meta."""

IMAGE_SIZE = 32
IMAGE_SHAPE = (3, IMAGE_SIZE, IMAGE_SIZE)
"""Channels, height, width of one stored image (uint8 RGB)."""

RAW_BUCKET = "raw-data"
PROCESSED_BUCKET = "processed-data"
MODELS_BUCKET = "models"
DATA_BUCKETS = (RAW_BUCKET, PROCESSED_BUCKET, MODELS_BUCKET)
MLFLOW_BUCKET = "mlflow"
"""Used by the tracking server alone."""
LOGS_BUCKET = "dagster-logs"
"""Where Dagster in the cluster keeps what steps print."""

LANDING_PREFIX = "landing/"
REJECTED_PREFIX = "rejected/"

SEED_RAW_KEY = "cifar10-dataset.tar.gz"
SEED_PROCESSED_KEY = "cifar10-processed.tar.gz"
SEED_MODEL_KEY = "resnet18_cifar10.pth"
"""Well-known objects of the pipeline this project replaces, kept as copies of the current version."""

MODEL_NAME = "cifar10"
"""Name under which the model is registered in MLflow and served over HTTP."""

MODEL_INPUT = "images"
MODEL_OUTPUT = "logits"
"""Names of the ONNX model's tensors; clients of the service give the input by its name."""

CHAMPION_ALIAS = "champion"

JOB_SPEC_VARIABLE = "CIFAR_JOB_SPEC"
"""Environment variable that holds the trainer's job spec, as JSON."""

EXIT_BAD_SPEC = 2
EXIT_RESUME = 143
"""The trainer was told to stop, or lost what it needs; it continues when started again with the same spec.

128 + SIGTERM. Dagster tries a step again that ended with it. To the restart policies in force (OnFailure in PyTorchJobs
of Dagster, Never in Argo's) it is a failure like any other. Dagster gives up a job that ended with EXIT_BAD_SPEC.
"""
