"""The context of a step that trains or deploys: of an asset or of an op."""

import dagster as dg

StepContext = dg.OpExecutionContext | dg.AssetExecutionContext
