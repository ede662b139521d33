"""Deploying a model: one interface with a local and a KServe implementation."""

from resources.inference_service.interface import (
    DeployedService,
    DeployRequest,
    InferenceServiceResource,
    ServiceStatus,
)
from resources.inference_service.local.resource import LocalInferenceService

__all__ = ["DeployRequest", "DeployedService", "InferenceServiceResource", "LocalInferenceService", "ServiceStatus"]
