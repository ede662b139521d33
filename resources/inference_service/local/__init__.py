"""A model server as a process of this machine, and the commands to see and stop it."""

from resources.inference_service.local.resource import LocalInferenceService

__all__ = ["LocalInferenceService"]
