"""Assets that a PyTorchJob makes, defined in YAML. See docs/trainjob.md."""

from dataclasses import dataclass

from resources.kubernetes import component  # not the class: what a module names becomes part of the registry
from resources.pytorch_job.client import PipesPyTorchJobClient
from resources.pytorch_job.config import PyTorchJobConfig


@dataclass
class PipesPyTorchJobComponent(component.PipesJobComponent):
    """Assets that a Kubeflow PyTorchJob makes and reports through Dagster Pipes."""

    client_class, config_class = PipesPyTorchJobClient, PyTorchJobConfig
