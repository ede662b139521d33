"""The Dagster Pipes client for PyTorchJobs."""

import functools

from resources.kubernetes.collector import build_job_collector
from resources.kubernetes.pipes import PipesJobClient
from resources.pytorch_job.client import PyTorchJob, PyTorchJobClient
from resources.pytorch_job.config import PyTorchJobConfig
from resources.pytorch_job.manifest import build_pytorch_job_manifest, job_name


class PipesPyTorchJobClient(PipesJobClient[PyTorchJobConfig]):
    """Runs a step's work as a PyTorchJob and waits for it. See PipesJobClient."""

    client_class = PyTorchJobClient
    build_name = staticmethod(job_name)
    build_manifest = staticmethod(build_pytorch_job_manifest)


build_pytorch_job_collector = functools.partial(build_job_collector, PyTorchJob)
