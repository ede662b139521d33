"""The pipeline's four steps apart from Dagster: as an Argo workflow, or on this machine. See docs/argo.md.

`conditions`, `template`, `naming` and `status` are pure; `client`, `launch`, `watch` and `report` know no Dagster;
`workflows` and `local` are the two resources behind `interface`.
"""

from resources.argo.interface import PipelineRequest, PipelineResource, PipelineResult

__all__ = ["PipelineRequest", "PipelineResource", "PipelineResult"]
