"""A Dagster component for assets that a PyTorchJob produces. See docs/trainjob.md."""

from dataclasses import dataclass

from resources.kubernetes import component  # not the class: every component class in a module is registered
from resources.pytorch_job.client import PipesPyTorchJobClient
from resources.pytorch_job.config import PyTorchJobConfig


@dataclass
class PipesPyTorchJobComponent(component.PipesJobComponent):
    """Assets that a Kubeflow PyTorchJob produces and reports through Dagster Pipes."""

    client_class, config_class = PipesPyTorchJobClient, PyTorchJobConfig
