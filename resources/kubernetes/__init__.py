"""Support for steps that own a custom resource of any kind. docs/pytorch_job.md lists the modules.

This package does not name a kind: `resources.pytorch_job`, `resources.argo` and `resources.inference_service.kserve`
add manifest, status and advice.
"""
