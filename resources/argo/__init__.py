"""The pipeline's four steps outside Dagster: as an Argo workflow, or on this machine. See docs/argo.md.

`template` and `workflow` are pure; `client` explains failures; `resource` and `local` implement `interface`.
"""

from resources.argo.interface import PipelineRequest, PipelineResource, PipelineResult

__all__ = ["PipelineRequest", "PipelineResource", "PipelineResult"]
