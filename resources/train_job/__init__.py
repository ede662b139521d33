"""TrainJobs of Kubeflow Trainer v2 from Dagster: a Pipes client and its parts. See docs/trainjob.md."""

from resources.kubernetes.errors import ResourceFailedError, SettingsError
from resources.kubernetes.job import JobState
from resources.kubernetes.job_config import SecretKey
from resources.train_job.client import PipesTrainJobClient, TrainJob, TrainJobClient, build_train_job_collector
from resources.train_job.config import TrainJobConfig
from resources.train_job.manifest import build_train_job_manifest

__all__ = [
    "JobState",
    "PipesTrainJobClient",
    "ResourceFailedError",
    "SecretKey",
    "SettingsError",
    "TrainJob",
    "TrainJobClient",
    "TrainJobConfig",
    "build_train_job_collector",
    "build_train_job_manifest",
]
