"""Kubeflow PyTorchJobs from Dagster: a Pipes client, and the parts it is made of. See docs/pytorch_job.md.

`config`, `manifest`, `naming`, `status` and `diagnosis` are pure; `client`, `launch` and `watch` know no Dagster;
`messages`, `pipes` and `collector` do.
"""

from resources.kubernetes.collector import CollectorTarget
from resources.kubernetes.diagnosis import WatchLimits
from resources.kubernetes.errors import KubernetesError, ResourceFailedError, SettingsError
from resources.kubernetes.job import JobState
from resources.pytorch_job.client import PyTorchJob, PyTorchJobClient
from resources.pytorch_job.config import PodTemplate, PyTorchJobConfig, RunPolicy, SecretKey, Toleration
from resources.pytorch_job.manifest import build_pytorch_job_manifest
from resources.pytorch_job.pipes import PipesPyTorchJobClient, build_pytorch_job_collector

__all__ = [
    "CollectorTarget",
    "JobState",
    "KubernetesError",
    "PipesPyTorchJobClient",
    "PodTemplate",
    "PyTorchJob",
    "PyTorchJobClient",
    "PyTorchJobConfig",
    "ResourceFailedError",
    "RunPolicy",
    "SecretKey",
    "SettingsError",
    "Toleration",
    "WatchLimits",
    "build_pytorch_job_collector",
    "build_pytorch_job_manifest",
]
