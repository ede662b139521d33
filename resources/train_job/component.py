"""A Dagster component for assets that a TrainJob produces. See docs/trainjob.md."""

from dataclasses import dataclass

from resources.kubernetes import component  # not the class: every component class in a module is registered
from resources.train_job.client import PipesTrainJobClient
from resources.train_job.config import TrainJobConfig


@dataclass
class PipesTrainJobComponent(component.PipesJobComponent):
    """Assets that a TrainJob of Kubeflow Trainer produces and reports through Dagster Pipes."""

    client_class, config_class = PipesTrainJobClient, TrainJobConfig
