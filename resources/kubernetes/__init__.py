"""What a step that owns a custom resource needs, of any kind. docs/pytorch_job.md lists the modules.

No kind is named here: `resources.pytorch_job`, `resources.argo` and `resources.inference_service.kserve` add manifest,
status and advice.
"""
