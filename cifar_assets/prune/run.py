"""Pruning: find out what is in use, list what can go, and remove it if asked to; on the command line and as a job."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import dagster as dg
from pydantic import Field

from cifar_assets.assets import keys
from cifar_assets.assets.record import DATA_VERSION_TAG
from cifar_assets.dataset.stores import Stores, stores_below
from cifar_assets.dataset.versions.processed import list_processed_versions
from cifar_assets.dataset.versions.raw import list_raw_digests
from cifar_assets.prune.rules import (
    PINS_PREFIX,
    Policy,
    Removal,
    compute_logs,
    data_of_models,
    find_digests,
    leftovers,
    orphans,
    prune_models,
    prune_processed,
    prune_raw,
    raw_of_processed,
)
from cifar_assets.prune.tracking import open_tracking
from cifar_assets.settings import read_settings
from resources.errors import ExplainedError
from resources.inference_service import InferenceServiceResource
from resources.mlflow.resource import MlflowResource
from resources.object_store import ObjectStore
from resources.object_store.resource import ObjectStoreResource

Say = Callable[[str], None]

_RECENT = {
    keys.RAW_DATASET: 1,
    keys.PROCESSED_DATASET: 1,
    keys.TRAINED_MODEL: 1,
    keys.ARGO_TRAINED_MODEL: 1,
    keys.INFERENCE_SERVICE: 2,
}
"""How many of the distinct versions that Dagster last recorded stay: two of the service, to allow a rollback."""

_LOOKED_THROUGH = 100
_ENDED = (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)
_UNFINISHED = [status for status in dg.DagsterRunStatus if status not in _ENDED]


class PruneError(ExplainedError):
    """It could not be found out what is needed. Nothing was removed."""


@dataclass
class Report:
    """What was, or would be, removed."""

    removals: list[Removal] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(removal.size for removal in self.removals)

    @property
    def total(self) -> str:
        return f"{len(self.removals):,} things, {_readable(self.size)}"

    def by_kind(self) -> dict[str, str]:
        """Number and size by kind of thing."""
        counts, sizes = Counter[str](), Counter[str]()
        for removal in self.removals:
            counts[removal.kind] += 1
            sizes[removal.kind] += removal.size
        return {kind: f"{counts[kind]:,}, {_readable(sizes[kind])}" for kind in sorted(counts)}


@dataclass(frozen=True)
class Pruner:
    """Prunes what these resources reach."""

    policy: Policy
    instance: dg.DagsterInstance
    object_store: ObjectStoreResource
    mlflow: MlflowResource
    serving: InferenceServiceResource

    def run(self, apply: bool, say: Say) -> Report:
        """List what can go, each thing with the reason, and with `apply` remove it.

        Raises PruneError, and removes nothing, where Dagster, MLflow, the service or a manifest does not tell what is
        in use.
        """
        report, root = Report(), self.object_store.root()
        stores = stores_below(root)

        def handle(removals: Iterable[Removal]) -> None:
            for removal in removals:
                verb = "Removing" if apply else "Would remove"
                say(f"{verb} {removal.kind} {removal.name} ({_readable(removal.size)}): {removal.reason}")
                if apply:
                    removal.remove()
                report.removals.append(removal)

        try:
            removals, processed, raw = self._versions(stores)
        except Exception as error:
            raise PruneError(f"Nothing was removed: what is in use is not known. {error}") from error
        handle(removals)
        if apply:  # including those published in the meantime
            processed, raw = set(list_processed_versions(stores.processed)), set(list_raw_digests(stores.raw))
        handle(orphans(stores, processed, raw, self.policy))
        handle(leftovers(self.policy))
        handle(compute_logs(self.policy, self.instance, root))
        return report

    def _versions(self, stores: Stores) -> tuple[list[Removal], set[str], set[str]]:
        """Models and versions to remove, and the processed and raw versions that stay."""
        tracking = open_tracking(self.mlflow, self.policy)
        in_use = self._in_use(stores.models) | (tracking.registered() if tracking else set())
        models = prune_models(stores.models, in_use, self.policy)
        in_use |= data_of_models(stores.models, models.kept)
        processed = prune_processed(stores.processed, in_use, self.policy)
        raw = prune_raw(stores.raw, in_use | raw_of_processed(stores.processed, processed.kept), self.policy)
        registered = list(tracking.removals(in_use | models.kept)) if tracking else []
        # A version in MLflow goes before the model that it names, and a model before its data.
        return [*registered, *models.removals, *processed.removals, *raw.removals], processed.kept, raw.kept

    def _in_use(self, models: ObjectStore) -> set[str]:
        """Digests that are served, pinned, last recorded by Dagster, or named by unfinished runs or RETRAIN_CONFIG."""
        in_use = {info.key.removeprefix(PINS_PREFIX) for info in models.list(PINS_PREFIX)}
        in_use |= find_digests(str(read_settings().retrain_config))
        in_use.add(self.serving.status().model_digest or "")
        for key, number in _RECENT.items():
            records = self.instance.fetch_materializations(key, limit=_LOOKED_THROUGH).records
            tags = [record.asset_materialization.tags or {} for record in records if record.asset_materialization]
            versions = dict.fromkeys(tag[DATA_VERSION_TAG] for tag in tags if DATA_VERSION_TAG in tag)
            in_use.update(list(versions)[:number])
        for record in self.instance.get_run_records(dg.RunsFilter(statuses=_UNFINISHED)):
            in_use |= find_digests(str(record.dagster_run.run_config))
        return in_use


def _readable(size: float) -> str:
    """Bytes as a person reads them, such as 1.5 MB."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


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
    return dg.Output(None, metadata={"applied": config.apply, "total": report.total, **report.by_kind()})


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
