"""Kubeflow PyTorchJobs from Dagster: a Pipes client, and the parts it is made of. See docs/pytorch_job.md.

`config`, `manifest`, `naming`, `status` and `diagnosis` are pure; `client`, `launch` and `watch` know no Dagster;
`messages`, `pipes` and `collector` do.
"""

from resources.kubernetes.diagnosis import WatchLimits
from resources.kubernetes.errors import KubernetesError, ResourceFailedError, SettingsError
from resources.pytorch_job.client import JobState, JobStatus, PyTorchJob, PyTorchJobClient, read_status
from resources.pytorch_job.collector import build_pytorch_job_collector
from resources.pytorch_job.config import ElasticPolicy, PodTemplate, PyTorchJobConfig, RunPolicy, SecretKey, Toleration
from resources.pytorch_job.manifest import build_pytorch_job_manifest
from resources.pytorch_job.pipes import PipesPyTorchJobClient

__all__ = [
    "ElasticPolicy",
    "JobState",
    "JobStatus",
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
    "read_status",
]
