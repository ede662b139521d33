"""Typed settings that all kinds of training job share. Rejects what would be refused, or silently never start."""

import re
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from resources.kubernetes.config import StrictConfig, mounts, without_secrets

_QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?([munkKMGTPE]|[KMGTPE]i)?")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_RESERVED_ENV = ("DAGSTER_PIPES_CONTEXT", "DAGSTER_PIPES_MESSAGES")


class SecretKey(StrictConfig):
    """One value of a Secret."""

    secret: str = Field(description="Name of the Secret, in the job's namespace.")
    key: str = Field(description="Key within it.")
    optional: bool = Field(default=False, description="Start without the variable if there is no such key.")


class JobConfig(StrictConfig):
    """The pods of a job, each with one container, and what they run."""

    image: str = Field(min_length=1, description="Image of every replica.")
    image_pull_secrets: list[str] = Field(default=[], description="Secrets with registry credentials.")
    command: list[str] = Field(default=[], description="Entry point; by default the image's.")
    args: list[str] = Field(default=[], description="Arguments of the entry point.")
    env: dict[str, str] = Field(default={}, description="Environment variables.")
    secret_env: dict[str, SecretKey] = Field(default={}, description="Environment variables read from Secrets.")

    replicas: int = Field(default=1, ge=1, le=10_000, description="Pods that train together.")
    nproc_per_node: int = Field(default=1, ge=1, description="Training processes in each pod (torchrun).")

    cpu: str | None = Field(default=None, description="CPU request of each replica, such as '500m' or '2'.")
    cpu_limit: str | None = Field(default=None, description="CPU limit; without one a replica may use idle CPUs.")
    memory: str | None = Field(default=None, description="Memory request and limit of each replica, such as '4Gi'.")
    gpu: int = Field(default=0, ge=0, description="GPUs of each replica.")
    gpu_resource: str = Field(default="nvidia.com/gpu", description="Resource name of a GPU.")
    shared_memory: str | None = Field(
        default=None, description="Size of /dev/shm, counted as memory; by default the container runtime's 64 MiB."
    )
    scratch: str | None = Field(default="2Gi", description="Size limit of a writable /tmp; null mounts none.")
    config_map_mounts: dict[str, str] = Field(
        default={},
        description="ConfigMaps whose keys become files, by folder, such as a certificate authority in /etc/cifar-ca. "
        "Those that do not exist are left out.",
    )

    node_selector: dict[str, str] = Field(default={}, description="Labels that a node must have.")
    tolerations: list[dict[str, Any]] = Field(
        default=[],
        description="Tolerations of the pods (V1Toleration); operator Exists unless a value is given.",
    )
    service_account_name: str | None = Field(
        default=None, description="Service account of the pods. Its token is not mounted: training needs no API."
    )
    run_as_user: int = Field(
        default=1000, ge=1, description="Numeric user id of every container, including the operator's init container."
    )
    termination_grace_seconds: int = Field(
        default=30, ge=0, description="Time between SIGTERM and SIGKILL when a pod is evicted."
    )
    queue: str | None = Field(
        default=None, min_length=1, description="LocalQueue of Kueue in which the job waits for quota."
    )
    labels: dict[str, str] = Field(default={}, description="Additional labels of the job and its pods.")
    extra_spec: dict[str, Any] = Field(
        default={}, description="Fields of the job's spec that have no setting here, merged over it unchecked."
    )

    @field_validator("env", "secret_env")
    @classmethod
    def _environment_names(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not _ENV_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not a valid name of an environment variable.")
            if name in _RESERVED_ENV:
                raise ValueError(f"{name} is set by Dagster Pipes: remove it.")
        return value

    @field_validator("config_map_mounts")
    @classmethod
    def _mountable(cls, value: dict[str, str]) -> dict[str, str]:
        return mounts(value)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        without_secrets(self.env)
        for name in ("cpu", "cpu_limit", "memory", "shared_memory", "scratch"):
            value = getattr(self, name)
            if value is not None and not _QUANTITY.fullmatch(value):
                raise ValueError(
                    f"{name} {value!r} is not a Kubernetes quantity such as '500m', '2', '512Mi' or '4Gi'."
                )
        both = sorted(set(self.env) & set(self.secret_env))
        if both:
            raise ValueError(f"env and secret_env both set {', '.join(both)}: keep one.")
        return self
