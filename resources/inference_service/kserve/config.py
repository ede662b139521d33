"""Typed settings of an InferenceService. Rejects what KServe would refuse, or accept and ignore."""

import math
from decimal import Decimal
from typing import Any, Literal

from kubernetes.utils import parse_quantity
from pydantic import Field, field_validator, model_validator

from resources.kubernetes.config import StrictConfig, mounts, object_names, without_secrets

CONTAINER_NAME = "kserve-container"
"""KServe requires a container with this name."""
PORT = 8080


class InferenceServiceSettings(StrictConfig):
    """Everything of an InferenceService except its name, its namespace and the model."""

    image: str = Field(min_length=1, description="Image of the model server.")
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        default="IfNotPresent", description="When the node pulls the image."
    )
    image_pull_secrets: list[str] = Field(default=[], description="Secrets with registry credentials.")
    mode: Literal["Standard", "Knative"] = Field(
        default="Standard",
        description="Standard: a Deployment and a Service. Knative: serverless, down to no pod.",
    )
    env: dict[str, str] = Field(default={}, description="Environment variables of the server.")
    env_secrets: list[str] = Field(default=["object-store-server"], description="Secrets whose keys become variables.")
    env_config_maps: list[str] = Field(
        default=["cifar-platform"], description="ConfigMaps whose keys become variables."
    )
    config_map_mounts: dict[str, str] = Field(
        default={},
        description="ConfigMaps whose keys become files, by folder, such as a certificate authority in /etc/cifar-ca.",
    )

    cpu: str = Field(default="200m", description="CPU request of each replica.")
    cpu_limit: str = Field(
        default="1", description="CPU limit of each replica, and number of threads that run the model."
    )
    memory: str = Field(default="384Mi", description="Memory request of each replica.")
    memory_limit: str = Field(default="512Mi", description="Memory limit of each replica.")
    scratch: str = Field(default="64Mi", description="Size limit of a writable /tmp.")

    min_replicas: int = Field(default=1, ge=0, description="Minimum number of replicas; 0 in Knative mode only.")
    max_replicas: int = Field(
        default=3, ge=1, description="Maximum number of replicas. Equal to min_replicas: no autoscaling."
    )
    target_cpu_percent: int = Field(
        default=80, ge=1, le=100, description="Standard: add replicas above this CPU utilization."
    )
    target_concurrency: int = Field(
        default=16, ge=1, description="Knative: add replicas above this number of open requests."
    )
    canary_percent: int | None = Field(
        default=None,
        ge=1,
        le=99,
        description="Percentage of the requests that a new model gets while it is evaluated. After that, it or the "
        "earlier model gets all of them. Standard mode needs a Gateway for this. None: no canary.",
    )

    drain_delay_seconds: float = Field(
        default=5.0, ge=0, description="How long a terminating replica accepts requests."
    )
    linger_seconds: float = Field(
        default=2.0, ge=0, description="After that: how long open connections are still served."
    )
    grace_seconds: float = Field(default=20.0, ge=1, description="After that: how long requests in progress may take.")
    startup_seconds: int = Field(default=120, ge=5, description="How long loading and warming up may take.")

    service_account_name: str | None = Field(
        default=None, description="Service account of the pods. Its token is not mounted: serving needs no API."
    )
    run_as_user: int = Field(default=1000, ge=1, description="Numeric user id of the server.")
    labels: dict[str, str] = Field(default={}, description="Additional labels of the service and its pods.")
    annotations: dict[str, str] = Field(default={}, description="Additional annotations of the service and its pods.")
    extra_predictor: dict[str, Any] = Field(
        default={},
        description="Fields of spec.predictor that have no setting here, such as nodeSelector or tolerations, "
        "unchecked. Knative accepts some of them only with feature flags.",
    )

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, value: dict[str, str]) -> dict[str, str]:
        return without_secrets(value)

    @field_validator("env_secrets", "env_config_maps")
    @classmethod
    def _object_names(cls, value: list[str]) -> list[str]:
        return object_names(value)

    @field_validator("config_map_mounts")
    @classmethod
    def _mountable(cls, value: dict[str, str]) -> dict[str, str]:
        return mounts(value)

    @property
    def serverless(self) -> bool:
        return self.mode == "Knative"

    @property
    def threads(self) -> int:
        """Threads of one run of the model: as many as the CPU limit allows to run concurrently."""
        return max(1, math.ceil(_amount("cpu_limit", self.cpu_limit)))

    @property
    def termination_grace_seconds(self) -> int:
        """The three phases of termination, plus some time for the process itself."""
        return math.ceil(self.drain_delay_seconds + self.linger_seconds + self.grace_seconds) + 5

    @model_validator(mode="after")
    def _consistent(self) -> "InferenceServiceSettings":
        _amount("scratch", self.scratch)
        for request, limit in (("cpu", "cpu_limit"), ("memory", "memory_limit")):
            if _amount(request, getattr(self, request)) > _amount(limit, getattr(self, limit)):
                raise ValueError(
                    f"{request} {getattr(self, request)!r} is more than {limit} {getattr(self, limit)!r}: "
                    "Kubernetes refuses a request above its limit."
                )
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is larger than max_replicas {self.max_replicas}.")
        if not self.serverless and self.min_replicas == 0:
            raise ValueError("min_replicas is 0, but only Knative mode can scale up from zero: use 1, or mode Knative.")
        return self


def _amount(what: str, text: str) -> Decimal:
    try:
        return parse_quantity(text)
    except ValueError as error:
        raise ValueError(
            f"{what} {text!r} is not a Kubernetes quantity such as '500m', '2', '512Mi' or '4Gi'."
        ) from error
