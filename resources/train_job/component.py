"""Assets that a TrainJob makes, defined in YAML. See docs/trainjob.md."""

from dataclasses import dataclass

from resources.kubernetes import component  # not the class: what a module names becomes part of the registry
from resources.train_job.client import PipesTrainJobClient
from resources.train_job.config import TrainJobConfig


@dataclass
class PipesTrainJobComponent(component.PipesJobComponent):
    """Assets that a TrainJob of Kubeflow Trainer makes and reports through Dagster Pipes."""

    client_class, config_class = PipesTrainJobClient, TrainJobConfig
