"""Pruning as a Dagster job, and a schedule for it that somebody has to switch on."""

import dagster as dg
from pydantic import Field

from cifar_assets.prune.policy import Policy
from cifar_assets.prune.run import Pruner, readable_size
from resources.inference_service import InferenceServiceResource
from resources.mlflow.resource import MlflowResource
from resources.object_store.resource import ObjectStoreResource


class PruneConfig(Policy):
    """What to keep, and whether to remove the rest."""

    apply: bool = Field(default=False, description="Remove it; otherwise the log only lists what would be removed.")


@dg.op(description="List what nothing needs any more, and with `apply` remove it.")
def prune_unused(
    context: dg.OpExecutionContext,
    config: PruneConfig,
    object_store: ObjectStoreResource,
    mlflow: MlflowResource,
    serving: InferenceServiceResource,
) -> dg.Output[None]:
    """One pruning; its output's metadata has number and size by kind of thing."""
    report = Pruner(config, context.instance, object_store, mlflow, serving).run(config.apply, context.log.info)
    kinds = {kind: f"{number:,}, {readable_size(size)}" for kind, (number, size) in report.by_kind().items()}
    total = f"{len(report.removals):,}, {readable_size(report.size)}"
    return dg.Output(None, metadata={"applied": config.apply, "total": total, **kinds})


@dg.job(
    name="prune",
    description="Lists old versions, models, checkpoints, logs and caches that nothing needs, or removes them.",
    tags={"purpose": "prune"},
)
def prune_job() -> None:
    """One op: see docs/data.md for what stays."""
    prune_unused()


prune_weekly = dg.ScheduleDefinition(
    name="prune_weekly",
    job=prune_job,
    cron_schedule="0 3 * * 0",
    execution_timezone="UTC",
    run_config={"ops": {"prune_unused": {"config": {"apply": True}}}},
    default_status=dg.DefaultScheduleStatus.STOPPED,
    description="Removes, every Sunday, what nothing needs any more. Off until somebody switches it on.",
)
