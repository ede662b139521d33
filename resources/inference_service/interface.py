"""What every deployment of the model server offers, whether a local process or a KServe InferenceService."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import dagster as dg

from resources.inference_service.client import InferenceClient


@dataclass(frozen=True)
class DeployRequest:
    """A model that passed the gate, what the deployment records about the decision, and how to judge a canary."""

    model_uri: str
    """Root of the model package: file:///... or s3://..."""
    model_digest: str
    model_version: str
    dagster_run_id: str | None = None
    dataset_digest: str | None = None
    test_accuracy: float | None = None
    accuracy_threshold: float | None = None
    find_fault: Callable[[InferenceClient], str | None] | None = field(default=None, compare=False, repr=False)
    """Asks a canary: why it may not get all requests, None when it may. Without it, no canary is tried."""

    def annotations(self) -> dict[str, str]:
        """What is known of the decision as text by name, for the deployment to carry."""
        values = {
            "dagster-run-id": self.dagster_run_id,
            "dataset-digest": self.dataset_digest,
            "test-accuracy": self.test_accuracy,
            "accuracy-threshold": self.accuracy_threshold,
        }
        return {name: str(value) for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class DeployedService:
    """A model that answers."""

    url: str
    """Base address; requests go to `<url>/v1/models/<name>:predict`."""
    model_digest: str
    model_version: str
    previous_digest: str | None
    """Digest of the model that answered before; None where none did."""
    changed: bool
    """False where this very model and version served already."""
    details: Mapping[str, str] = field(default_factory=dict)
    """Where to look further, by name: process, log file, Kubernetes object."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """What a request has to carry to arrive, such as the `Host` of an ingress."""


@dataclass(frozen=True)
class ServiceStatus:
    """What answers now."""

    ready: bool
    url: str | None
    model_digest: str | None
    model_version: str | None
    reason: str | None
    """Why nothing answers, or why the last deployment failed while an older model still does."""
    details: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


class InferenceServiceResource(dg.ConfigurableResource, ABC):
    """Puts models into service. It decides nothing: whether a model may be deployed is the gate's business."""

    @abstractmethod
    def deploy(self, request: DeployRequest) -> DeployedService:
        """Serve the model, and return once the endpoint answers with its digest. Deploying it twice changes nothing.

        No request is dropped on the way. Raises DeployError naming the reason; what served before then still does.
        """

    @abstractmethod
    def status(self) -> ServiceStatus:
        """What answers now. Never raises for a service that is absent or broken: `reason` says so."""

    @abstractmethod
    def delete(self) -> bool:
        """Take the service down after it has answered what it has. False where there was none."""
