"""Putting a model into service: one interface, a local twin and a KServe one."""

from resources.inference_service.interface import (
    DeployedService,
    DeployRequest,
    InferenceServiceResource,
    ServiceStatus,
)
from resources.inference_service.local.resource import LocalInferenceService

__all__ = [
    "DeployRequest",
    "DeployedService",
    "InferenceServiceResource",
    "LocalInferenceService",
    "ServiceStatus",
]
