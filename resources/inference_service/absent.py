"""For deployments in which nothing of ours serves yet."""

from cifar_assets.errors import DeployError
from resources.inference_service.interface import (
    DeployedService,
    DeployRequest,
    InferenceServiceResource,
    ServiceStatus,
)

_REASON = "This deployment serves nothing: KServe is not connected yet. Serve the model from a local deployment."


class NoInferenceService(InferenceServiceResource):
    """Refuses to deploy and says so, so that data and training work where serving is not set up."""

    def deploy(self, request: DeployRequest) -> DeployedService:
        raise DeployError(f"Model {request.model_digest} was not deployed. {_REASON}")

    def status(self) -> ServiceStatus:
        return ServiceStatus(False, None, None, None, _REASON)

    def delete(self) -> bool:
        return False
