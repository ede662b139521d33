"""What a trainer and those who start it agree on. Needs no Dagster."""

from abc import ABC, abstractmethod

from pydantic import BaseModel, Field

from resources.mlflow.target import MlflowTarget

JOB_SPEC_VARIABLE = "CIFAR_JOB_SPEC"
"""Environment variable that holds the trainer's job spec, as JSON."""

PIPES_PREFIX = "pipes/"
"""Where in the models bucket the Pipes messages of trainings are, in one folder for each job below `messages/`."""

EXIT_BAD_SPEC = 2
"""The process refuses what it was given: no other attempt helps."""
EXIT_RESUME = 143
"""The trainer was told to stop, or lost what it needs; it continues when started again with the same spec.

128 + SIGTERM. Dagster tries a step again that ended with it. To the restart policies in force (OnFailure in PyTorchJobs
of Dagster, Never in Argo's) it is a failure like any other. Dagster gives up a job that ended with EXIT_BAD_SPEC.
"""


class TrainingSpec(BaseModel, ABC):
    """One training job, complete. What is trained, and how, is the subclass's."""

    mlflow: MlflowTarget | None = Field(default=None, description="Where to track the training; none tracks nothing.")

    @property
    @abstractmethod
    def name(self) -> str:
        """What the names of its jobs in a cluster begin with."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """Digest of what decides the weights. Checkpoints are found by it, so the same job continues them."""
