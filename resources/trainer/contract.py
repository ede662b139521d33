"""The contract between a trainer and the process that starts it. Needs no Dagster."""

from abc import ABC, abstractmethod

from pydantic import BaseModel, Field

from resources.mlflow.target import MlflowTarget

JOB_SPEC_VARIABLE = "CIFAR_JOB_SPEC"
"""Environment variable with the trainer's job spec as JSON."""

PIPES_PREFIX = "pipes/"
"""Key prefix in the models bucket for the Pipes messages of trainings, in one folder per job below `messages/`."""

EXIT_BAD_SPEC = 2
"""The process rejects its job spec: no other attempt helps."""
EXIT_RESUME = 143
"""The trainer was asked to stop, or lost something it needs; it continues if started again with the same spec.

128 + SIGTERM. Dagster retries a step that ended with it. For the restart policies in use (OnFailure in PyTorchJobs of
Dagster, Never in Argo's) it is an ordinary failure. Dagster abandons a job that ended with EXIT_BAD_SPEC.
"""


class TrainingSpec(BaseModel, ABC):
    """A complete training job. A subclass defines what is trained, and how."""

    mlflow: MlflowTarget | None = Field(
        default=None, description="Where to track the training; by default it is not tracked."
    )

    @property
    @abstractmethod
    def name(self) -> str:
        """Prefix of its job names in a cluster."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """Digest of everything that determines the weights. It identifies checkpoints: the same job continues them."""
