"""What a step that owns a custom resource needs, of any kind: API, pods, launch, watch, diagnosis, errors.

`job` and `pipes` go further for kinds that run pods to an end. No kind is named here: `resources.pytorch_job`,
`resources.argo` and `resources.inference_service.kserve` add manifest, status and advice.
"""
