"""Typed settings of a PyTorchJob. Rejects what the operator would refuse, or silently never start."""

from typing import Any, Literal

from dagster_k8s.job import UserDefinedDagsterK8sConfig
from dagster_k8s.models import k8s_model_from_dict
from kubernetes import client as k8s
from pydantic import Field, field_validator, model_validator

from resources.kubernetes.config import StrictConfig, object_names
from resources.kubernetes.errors import SettingsError
from resources.kubernetes.job_config import JobConfig

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


class PyTorchJobConfig(JobConfig):
    """Settings of a PyTorchJob, except its name, namespace and what Dagster adds to it."""

    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        default="IfNotPresent", description="When the node pulls the image."
    )
    env_secrets: list[str] = Field(default=[], description="Secrets whose every key becomes an environment variable.")
    env_config_maps: list[str] = Field(
        default=[], description="ConfigMaps whose every key becomes an environment variable."
    )
    restart_policy: Literal["OnFailure", "Never", "ExitCode", "Always"] = Field(
        default="OnFailure",
        description="When to restart a failed container. ExitCode: codes of 128 and above are retried, others final.",
    )
    run_policy: RunPolicy = Field(default_factory=RunPolicy, description="Deadline, retries and cleanup.")
    pod_template: PodTemplate = Field(
        default_factory=PodTemplate, description="Raw Kubernetes config merged over the pods."
    )

    @field_validator("env_secrets", "env_config_maps")
    @classmethod
    def _object_names(cls, value: list[str]) -> list[str]:
        return object_names(value)
