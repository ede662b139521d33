"""Raw Kubernetes config that is laid over a job's pods."""

from typing import Any, Literal

import kubernetes.client
from dagster_k8s.job import K8sConfigMergeBehavior, UserDefinedDagsterK8sConfig
from dagster_k8s.models import k8s_model_from_dict
from pydantic import Field, model_validator

from resources.kubernetes.config import StrictConfig
from resources.kubernetes.errors import SettingsError

CONTAINER_NAME = "pytorch"
"""The operator looks for a container of this name and ignores every other."""


class PodTemplate(StrictConfig):
    """Raw Kubernetes config laid over the pods, with the keys and the merging of dagster-k8s' run_k8s_config.

    Field names may be in snake_case or camelCase. DEEP merges mappings and appends to lists; SHALLOW replaces.
    """

    container_config: dict[str, Any] = Field(default={}, description="Fields of the container `pytorch` (V1Container).")
    pod_spec_config: dict[str, Any] = Field(
        default={}, description="Fields of the pod spec (V1PodSpec); `containers` adds sidecars."
    )
    pod_template_spec_metadata: dict[str, Any] = Field(
        default={}, description="Fields of the pod's metadata (V1ObjectMeta)."
    )
    merge_behavior: Literal["DEEP", "SHALLOW"] = Field(
        default="DEEP", description="How these fields join those that the typed settings made."
    )

    @model_validator(mode="after")
    def _known_to_kubernetes(self) -> "PodTemplate":
        self.user_config()
        return self

    def user_config(self) -> UserDefinedDagsterK8sConfig:
        """The overrides as dagster-k8s reads them; SettingsError for a field that Kubernetes does not have."""
        try:
            user_config = UserDefinedDagsterK8sConfig(
                container_config=self.container_config,
                pod_spec_config=self.pod_spec_config,
                pod_template_spec_metadata=self.pod_template_spec_metadata,
                merge_behavior=K8sConfigMergeBehavior(self.merge_behavior),
            )
            k8s_model_from_dict(kubernetes.client.V1PodSpec, {**user_config.pod_spec_config, "containers": []})
            k8s_model_from_dict(kubernetes.client.V1Container, {**user_config.container_config, "name": CONTAINER_NAME})
        except Exception as error:  # dagster-k8s raises plain Exception for unknown fields
            raise SettingsError(f"pod_template is not what Kubernetes takes: {error}") from error
        name = user_config.container_config.get("name", CONTAINER_NAME)
        if name != CONTAINER_NAME:
            raise SettingsError(
                f"pod_template names the container {name!r}: the training operator only knows one named "
                f"{CONTAINER_NAME!r}."
            )
        if user_config.pod_spec_config.get("restart_policy"):
            raise SettingsError(
                "pod_template sets the pods' restartPolicy, which the training operator replaces: use restart_policy."
            )
        return user_config
