"""A model server as a local process, and the commands to show and stop it."""

from resources.inference_service.local.resource import LocalInferenceService

__all__ = ["LocalInferenceService"]
