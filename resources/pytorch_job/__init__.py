"""Kubeflow PyTorchJobs from Dagster: a Pipes client and its parts. See docs/pytorch_job.md."""

from resources.kubernetes.errors import ResourceFailedError, SettingsError
from resources.kubernetes.job import JobState
from resources.kubernetes.job_config import SecretKey
from resources.pytorch_job.client import (
    PipesPyTorchJobClient,
    PyTorchJob,
    PyTorchJobClient,
    build_pytorch_job_collector,
)
from resources.pytorch_job.config import PodTemplate, PyTorchJobConfig, RunPolicy
from resources.pytorch_job.manifest import build_pytorch_job_manifest

__all__ = [
    "JobState",
    "PipesPyTorchJobClient",
    "PodTemplate",
    "PyTorchJob",
    "PyTorchJobClient",
    "PyTorchJobConfig",
    "ResourceFailedError",
    "RunPolicy",
    "SecretKey",
    "SettingsError",
    "build_pytorch_job_collector",
    "build_pytorch_job_manifest",
]
