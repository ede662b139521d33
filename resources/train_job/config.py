"""Typed settings of a TrainJob. Its runtime, such as the one in k8s/trainjob, has the settings that it lacks."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from resources.kubernetes.job_config import JobConfig

CONTAINER_NAME = "node"
"""Trainer applies its settings to the container with this name, in the runtime's job of the same name."""
DEFAULT_GRACE_SECONDS = 30
"""Kubernetes' default for pods. Only another value is part of the job."""
_RUNTIME_ENV = ("PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT")


class TrainJobConfig(JobConfig):
    """Settings of a TrainJob, except its name, namespace and what Dagster adds to it.

    Restarts, the image pull policy and whole Secrets as environment are set in the runtime.
    """

    runtime: str = Field(default="torch-distributed", min_length=1, description="Name of the training runtime.")
    runtime_kind: Literal["TrainingRuntime", "ClusterTrainingRuntime"] = Field(
        default="ClusterTrainingRuntime",
        description="Scope of the runtime: the job's namespace, or the cluster.",
    )
    active_deadline_seconds: int = Field(
        default=24 * 3600,
        ge=1,
        description="A job that is still active after this time fails. The time restarts after each suspension.",
    )

    @field_validator("env", "secret_env")
    @classmethod
    def _set_by_trainer(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in _RUNTIME_ENV:
            if name in value:
                raise ValueError(f"{name} is set by Trainer: use replicas and nproc_per_node.")
        return value

    @model_validator(mode="after")
    def _kept_in_a_queue(self) -> Self:
        """Kueue 0.19 removes the field from the job when it admits it, and JobSet then refuses to resume the job."""
        if self.queue and self.termination_grace_seconds != DEFAULT_GRACE_SECONDS:
            raise ValueError(
                "termination_grace_seconds of a TrainJob in a queue must be the default: set "
                "terminationGracePeriodSeconds in the runtime."
            )
        return self
