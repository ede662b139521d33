"""The model server as a KServe InferenceService."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dagster as dg
from pydantic import Field, model_validator

from resources.errors import DeployError
from resources.inference_service.client import ServerError
from resources.inference_service.interface import (
    DeployedService,
    DeployRequest,
    InferenceServiceResource,
    ServiceStatus,
)
from resources.inference_service.kserve.client import InferenceService, InferenceServiceClient
from resources.inference_service.kserve.config import InferenceServiceSettings
from resources.inference_service.kserve.deployer import ServiceDeployer
from resources.inference_service.kserve.endpoint import ServiceEndpoint
from resources.inference_service.kserve.manifest import (
    build_inference_service_manifest,
    check_service_name,
    predictor_name,
)
from resources.inference_service.kserve.watch import RolloutLimits, ServiceView
from resources.kubernetes.api import load_configuration
from resources.kubernetes.errors import KubernetesError, with_notes

DEFAULT_NAME = "cifar10"
DEFAULT_GATEWAY = "kourier-system/kourier-internal"


class KServeInferenceService(InferenceServiceResource):
    """Serves from the cluster that the pod's service account or KUBECONFIG names, in Standard or serverless mode."""

    settings: InferenceServiceSettings = Field(description="The InferenceService's own settings.")
    namespace: str = Field(description="Namespace of the InferenceService.")
    name: str = Field(default=DEFAULT_NAME, description="Name of the InferenceService.")
    kubeconfig_file: str | None = Field(
        default=None, description="Kubeconfig; by default the pod's service account, else KUBECONFIG."
    )
    base_url: str | None = Field(
        default=None,
        description="Where Dagster reaches the service, such as an ingress. By default the cluster's DNS in a pod, and "
        "elsewhere a port that the process forwards itself.",
    )
    host: str | None = Field(
        default=None, description="Host header for base_url. By default the host of the service's own URL."
    )
    gateway: str = Field(
        default=DEFAULT_GATEWAY,
        description="Knative's gateway as namespace/service, for a port forwarded to a serverless service.",
    )
    rollout_timeout_seconds: float = Field(
        default=600.0,
        gt=0,
        description="How long a new version may take until it answers, a large image that is pulled included.",
    )
    unschedulable_timeout_seconds: float = Field(
        default=120.0, gt=0, description="How long a pod may wait for a node that has room for it."
    )
    blocked_timeout_seconds: float = Field(
        default=45.0, gt=0, description="How long to wait for an image that cannot be pulled, or a missing Secret."
    )

    @model_validator(mode="after")
    def _names_hold(self) -> "KServeInferenceService":
        check_service_name(self.name, self.namespace, self.settings)
        return self

    def deploy(self, request: DeployRequest) -> DeployedService:
        with self._explained(f"model {request.model_digest} was not deployed"):
            view = self._view()
            outcome = ServiceDeployer(view, self._build).deploy(request)
            client = view.endpoint.client(outcome.service)
        return DeployedService(
            url=client.base_url,
            model_digest=request.model_digest,
            model_version=request.model_version,
            previous_digest=outcome.previous_digest,
            changed=outcome.changed,
            details=self._details(outcome.service, client.base_url),
            headers=client.headers,
        )

    def status(self) -> ServiceStatus:
        try:
            view = self._view()
            service = view.get()
            reason = view.client.last_failure(self.namespace, self.name)
            if service is None:
                return ServiceStatus(False, None, None, None, reason or f"There is no {self._label}.")
            client = view.endpoint.client(service)
        except KubernetesError as error:
            return ServiceStatus(False, None, None, None, str(error))
        ready, digest, version = False, None, None
        try:
            served = client.served_model()
            ready, digest, version = served.ready, served.model_digest, served.model_version
        except ServerError as error:
            reason = reason or "; ".join(service.complaints) or str(error)
        details = self._details(service, client.base_url)
        return ServiceStatus(ready, client.base_url, digest, version, reason, details, client.headers)

    def delete(self) -> bool:
        with self._explained("it was not deleted"):
            return ServiceDeployer(self._view(), self._build).delete()

    @contextmanager
    def _explained(self, failure: str) -> Iterator[None]:
        try:
            yield
        except KubernetesError as error:
            raise DeployError(f"{self._label}: {failure}: {with_notes(error)}", transient=error.transient) from error

    @property
    def _label(self) -> str:
        return f"InferenceService {self.namespace}/{self.name}"

    def _details(self, service: InferenceService, url: str) -> dict[str, str]:
        predictor = predictor_name(self.name)
        details = {
            "deployment": f"KServe, {self.settings.mode} mode",
            "inference_service": f"{self.namespace}/{self.name}",
            "cluster_url": f"http://{predictor}.{self.namespace}.svc",
        }
        if service.status.get("url"):
            details["kserve_url"] = str(service.status["url"])
        if url.startswith("http://127.0.0.1:") and not self.base_url:
            details["url_is"] = "forwarded by this run's process and gone with it"
            if not self.settings.serverless:
                details["to_reach_it"] = f"kubectl -n {self.namespace} port-forward svc/{predictor} 8080:80"
        return details

    def _build(self, request: DeployRequest) -> dict[str, Any]:
        return build_inference_service_manifest(self.settings, request, name=self.name, namespace=self.namespace)

    def _client(self) -> InferenceServiceClient:
        return InferenceServiceClient.production(self.kubeconfig_file)

    def _view(self) -> ServiceView:
        configuration, in_cluster = load_configuration(self.kubeconfig_file)
        return ServiceView(
            client=self._client(),
            endpoint=ServiceEndpoint(configuration, in_cluster, self.gateway, self.base_url, self.host),
            namespace=self.namespace,
            name=self.name,
            limits=RolloutLimits(
                start_timeout_seconds=self.rollout_timeout_seconds,
                unschedulable_timeout_seconds=self.unschedulable_timeout_seconds,
                blocked_timeout_seconds=self.blocked_timeout_seconds,
            ),
            log=dg.get_dagster_logger(),
        )
