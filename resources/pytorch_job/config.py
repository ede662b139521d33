"""Typed settings of a PyTorchJob. Rejects what the operator would refuse, or silently never start."""

import re
from typing import Any, Literal

from dagster_k8s.job import UserDefinedDagsterK8sConfig
from dagster_k8s.models import k8s_model_from_dict
from kubernetes import client as k8s
from pydantic import Field, field_validator, model_validator

from resources.kubernetes.config import StrictConfig, without_secrets
from resources.kubernetes.errors import SettingsError

CONTAINER_NAME = "pytorch"
"""The operator requires a container with this name and ignores all others."""


class PodTemplate(StrictConfig):
    """Raw Kubernetes config merged over the pods, with the keys and merge rules of dagster-k8s' run_k8s_config.

    Field names may be in snake_case or camelCase. Mappings are merged, lists are appended to.
    """

    container_config: dict[str, Any] = Field(default={}, description="Fields of the container `pytorch` (V1Container).")
    pod_spec_config: dict[str, Any] = Field(
        default={}, description="Fields of the pod spec (V1PodSpec); `containers` adds sidecars."
    )
    pod_template_spec_metadata: dict[str, Any] = Field(
        default={}, description="Fields of the pod's metadata (V1ObjectMeta)."
    )

    @model_validator(mode="after")
    def _known_to_kubernetes(self) -> "PodTemplate":
        k8s_config = self.k8s_config()
        if k8s_config.container_config.get("name", CONTAINER_NAME) != CONTAINER_NAME:
            raise SettingsError(f"pod_template: the training operator supports only one container, {CONTAINER_NAME!r}.")
        if k8s_config.pod_spec_config.get("restart_policy"):
            raise SettingsError("pod_template: the training operator sets the pods' restartPolicy: use restart_policy.")
        return self

    def k8s_config(self) -> UserDefinedDagsterK8sConfig:
        """The overrides in dagster-k8s' form; SettingsError for a field that Kubernetes does not have."""
        try:
            k8s_config = UserDefinedDagsterK8sConfig(**self.model_dump())
            k8s_model_from_dict(k8s.V1PodSpec, {**k8s_config.pod_spec_config, "containers": []})
            k8s_model_from_dict(k8s.V1Container, {**k8s_config.container_config, "name": CONTAINER_NAME})
        except Exception as error:  # dagster-k8s raises plain Exception for unknown fields
            raise SettingsError(f"pod_template is not valid for Kubernetes: {error}") from error
        return k8s_config


_QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?([munkKMGTPE]|[KMGTPE]i)?")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_RESERVED_ENV = ("DAGSTER_PIPES_CONTEXT", "DAGSTER_PIPES_MESSAGES")


class SecretKey(StrictConfig):
    """One value of a Secret."""

    secret: str = Field(description="Name of the Secret, in the job's namespace.")
    key: str = Field(description="Key within it.")


class RunPolicy(StrictConfig):
    """Limits of a job, and what is kept after it ends."""

    active_deadline_seconds: int = Field(
        default=24 * 3600,
        ge=1,
        description="A job that is still active after this time fails: no training runs forever.",
    )
    ttl_seconds_after_finished: int = Field(
        default=24 * 3600, ge=0, description="A finished job is deleted with its pods after this time."
    )
    backoff_limit: int = Field(
        default=2, ge=0, description="Container restarts, over all replicas, after which the job fails."
    )
    clean_pod_policy: Literal["All", "Running", "None"] = Field(
        default="Running", description="Which pods are deleted when the job finishes; finished pods keep their logs."
    )


class PyTorchJobConfig(StrictConfig):
    """Settings of a PyTorchJob, except its name, namespace and what Dagster adds to it."""

    image: str = Field(min_length=1, description="Image of every replica.")
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        default="IfNotPresent", description="When the node pulls the image."
    )
    image_pull_secrets: list[str] = Field(default=[], description="Secrets with registry credentials.")
    command: list[str] = Field(default=[], description="Entry point; by default the image's.")
    args: list[str] = Field(default=[], description="Arguments of the entry point.")
    env: dict[str, str] = Field(default={}, description="Environment variables.")
    secret_env: dict[str, SecretKey] = Field(default={}, description="Environment variables read from Secrets.")
    env_secrets: list[str] = Field(default=[], description="Secrets whose every key becomes an environment variable.")
    env_config_maps: list[str] = Field(
        default=[], description="ConfigMaps whose every key becomes an environment variable."
    )

    replicas: int = Field(default=1, ge=1, le=10_000, description="Pods: one master, the others workers.")
    nproc_per_node: int = Field(default=1, ge=1, description="Training processes in each pod (torchrun).")
    restart_policy: Literal["OnFailure", "Never", "ExitCode", "Always"] = Field(
        default="OnFailure",
        description="When to restart a failed container. ExitCode: codes of 128 and above are retried, others final.",
    )
    run_policy: RunPolicy = Field(default_factory=RunPolicy, description="Deadline, retries and cleanup.")

    cpu: str | None = Field(default=None, description="CPU request of each replica, such as '500m' or '2'.")
    cpu_limit: str | None = Field(default=None, description="CPU limit; without one a replica may use idle CPUs.")
    memory: str | None = Field(default=None, description="Memory request and limit of each replica, such as '4Gi'.")
    gpu: int = Field(default=0, ge=0, description="GPUs of each replica.")
    gpu_resource: str = Field(default="nvidia.com/gpu", description="Resource name of a GPU.")
    shared_memory: str | None = Field(
        default=None, description="Size of /dev/shm, counted as memory; by default the runtime's 64 MiB."
    )
    scratch: str | None = Field(default="2Gi", description="Size limit of a writable /tmp; by default none is mounted.")

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
    labels: dict[str, str] = Field(default={}, description="Additional labels of the job and its pods.")
    pod_template: PodTemplate = Field(
        default_factory=PodTemplate, description="Raw Kubernetes config merged over the pods."
    )
    extra_spec: dict[str, Any] = Field(
        default={}, description="Fields of the PyTorchJob's spec that have no setting here, merged over it unchecked."
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

    @model_validator(mode="after")
    def _consistent(self) -> "PyTorchJobConfig":
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
