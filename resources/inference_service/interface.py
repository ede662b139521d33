"""The interface of every deployment of the model server, a local process or a KServe InferenceService."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import dagster as dg

from resources.inference_service.client import InferenceClient


@dataclass(frozen=True)
class DeployRequest:
    """A model that passed the gate, the records of that decision for the deployment, and the test of a canary."""

    model_uri: str
    """Root of the model package: file:///... or s3://..."""
    model_digest: str
    model_version: str
    dagster_run_id: str | None = None
    dataset_digest: str | None = None
    test_accuracy: float | None = None
    accuracy_threshold: float | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    """Further options of the server by name, which are also recorded as annotations."""
    find_fault: Callable[[InferenceClient], str | None] | None = field(default=None, compare=False, repr=False)
    """Tests a canary: returns why it must not get all requests, None if it may. Without it, no canary is used."""

    def annotations(self) -> dict[str, str]:
        """The decision as text values by name, for the deployment's annotations."""
        values = {
            "dagster-run-id": self.dagster_run_id,
            "dataset-digest": self.dataset_digest,
            "test-accuracy": self.test_accuracy,
            "accuracy-threshold": self.accuracy_threshold,
            **{name.replace("_", "-"): value for name, value in self.options.items()},
        }
        return {name: str(value) for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class DeployedService:
    """A model that is being served."""

    url: str
    """Base address; requests go to `<url>/v1/models/<name>:predict`."""
    model_digest: str
    model_version: str
    previous_digest: str | None
    """Digest of the previous model; None if there was none."""
    changed: bool
    """False if this exact model and version was already served."""
    details: Mapping[str, str] = field(default_factory=dict)
    """Where to find details, by name: process, log file, Kubernetes object."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Headers that requests need, such as the `Host` of an ingress."""


@dataclass(frozen=True)
class ServiceStatus:
    """The model that is served now."""

    ready: bool
    url: str | None
    model_digest: str | None
    model_version: str | None
    reason: str | None
    """Why no model is served, or why the last deployment failed while an older model is still served."""
    details: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


class InferenceServiceResource(dg.ConfigurableResource, ABC):
    """Deploys models. Whether a model may be deployed is decided by the gate."""

    @abstractmethod
    def deploy(self, request: DeployRequest) -> DeployedService:
        """Serve the model, and return once the endpoint answers with its digest. Deploying it twice changes nothing.

        No request is dropped during the switch. Raises DeployError naming the reason; the previous model is then still
        served.
        """

    @abstractmethod
    def status(self) -> ServiceStatus:
        """The current status. Does not raise for a service that is absent or broken: `reason` says so."""

    @abstractmethod
    def delete(self) -> bool:
        """Remove the service after it has completed its open requests. False if there was none."""
