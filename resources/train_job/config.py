"""Typed settings of a TrainJob. What a TrainJob cannot say is in the runtime that it names: k8s/trainjob has one."""

from typing import Any, Literal

from pydantic import Field, field_validator

from resources.kubernetes.job_config import JobConfig

CONTAINER_NAME = "node"
"""Trainer gives its settings to the container of this name, in the runtime's job of the same name."""
_RUNTIME_ENV = ("PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT")


class TrainJobConfig(JobConfig):
    """Everything of a TrainJob except its name, namespace and what Dagster adds to it.

    The runtime decides what has no field here: restarts, the pull policy, and environment taken whole from Secrets.
    """

    runtime: str = Field(default="torch-distributed", min_length=1, description="Name of the training runtime.")
    runtime_kind: Literal["TrainingRuntime", "ClusterTrainingRuntime"] = Field(
        default="ClusterTrainingRuntime", description="Whether the runtime is in the job's namespace or the cluster's."
    )
    active_deadline_seconds: int = Field(
        default=24 * 3600,
        ge=1,
        description="A job still active after this time fails. Trainer counts it from the last suspension.",
    )

    @field_validator("env", "secret_env")
    @classmethod
    def _not_the_runtimes(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in _RUNTIME_ENV:
            if name in value:
                raise ValueError(f"{name} is set by Trainer: use replicas and nproc_per_node.")
        return value
