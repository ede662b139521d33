"""Pruning: determine what is in use, list what can be removed, and optionally remove it. See docs/data.md."""

from collections import Counter
from collections.abc import Callable, Iterable

import dagster as dg
from pydantic import Field

from cifar_assets.assets import keys
from cifar_assets.assets.binding import bind
from cifar_assets.assets.record import UNFINISHED, materializations
from cifar_assets.data_set import DataSet, read_data_sets
from cifar_assets.dataset.stores import Stores
from cifar_assets.dataset.versions.processed import list_processed_versions
from cifar_assets.dataset.versions.raw import list_raw_digests
from cifar_assets.prune.rules import (
    Policy,
    Removal,
    compute_logs,
    data_of_models,
    find_digests,
    leftovers,
    orphans,
    predictions,
    prune_models,
    prune_processed,
    prune_raw,
    raw_of_processed,
    starts_of_models,
    traffic,
)
from cifar_assets.prune.tracking import open_tracking, prune_tracking, registered_models
from cifar_assets.settings import read_settings
from resources.errors import ExplainedError
from resources.inference_service import InferenceServiceResource
from resources.mlflow.resource import MlflowResource
from resources.object_store import MODELS_BUCKET, ObjectStore
from resources.object_store.resource import ObjectStoreResource

PINS_PREFIX = "pinned/"
"""In the models bucket: one object per digest of a model or data version that is never removed."""

_RECENT = {
    keys.RAW_DATASET: 1,
    keys.PROCESSED_DATASET: 1,
    keys.TRAINED_MODEL: 1,
    keys.ARGO_TRAINED_MODEL: 1,
    keys.INFERENCE_SERVICE: 2,
}
"""Number of distinct versions last recorded by Dagster to keep: two for the service, to allow a rollback."""


class PruneError(ExplainedError):
    """What is in use could not be determined. Nothing was removed."""


def prune(
    data_set: DataSet,
    policy: Policy,
    instance: dg.DagsterInstance,
    object_store: ObjectStoreResource,
    mlflow: MlflowResource,
    serving: InferenceServiceResource,
    *,
    apply: bool,
    say: Callable[[str], None],
) -> list[Removal]:
    """List what can be removed, with the reason for each item, and with `apply` remove it.

    Only objects of this data set, and temporary files and logs of all. Raises PruneError, and removes nothing, if
    Dagster, MLflow, the service or a manifest cannot tell what is in use.
    """
    stores = Stores(object_store.raw, object_store.processed, object_store.models)
    done: list[Removal] = []

    def handle(removals: Iterable[Removal]) -> None:
        for removal in removals:
            verb = "Removing" if apply else "Would remove"
            say(f"{verb} {removal.kind} {removal.name} ({_readable(removal.size)}): {removal.reason}")
            if apply:
                removal.remove()
            done.append(removal)

    try:
        in_use = _in_use(data_set, instance, stores.models, serving)
        in_use |= starts_of_models(object_store.root().bucket(MODELS_BUCKET))
        removals, processed, raw = _versions(stores, in_use, mlflow, policy)
    except Exception as error:
        raise PruneError(f"Nothing was removed: what is in use could not be determined. {error}") from error
    handle(removals)
    if apply:  # including those published in the meantime
        processed, raw = set(list_processed_versions(stores.processed)), set(list_raw_digests(stores.raw))
    handle(orphans(stores, processed, raw, policy))
    handle(leftovers(policy, object_store.root()))
    handle(compute_logs(policy, instance, object_store.root()))
    handle(predictions(policy, stores.processed))
    handle(traffic(policy, object_store.traffic, stores.raw))
    return done


def _versions(
    stores: Stores, in_use: set[str], mlflow: MlflowResource, policy: Policy
) -> tuple[list[Removal], set[str], set[str]]:
    """Models and versions to remove, and the processed and raw versions to keep."""
    client = open_tracking(mlflow)
    in_use |= registered_models(client, mlflow.registered_model, policy) if client else set()
    models = prune_models(stores.models, in_use, policy)
    in_use |= models.kept | data_of_models(stores.models, models.kept)
    processed = prune_processed(stores.processed, in_use, policy)
    raw = prune_raw(stores.raw, in_use | raw_of_processed(stores.processed, processed.kept), policy)
    gone = {removal.name for removal in models.removals}
    registered = prune_tracking(client, mlflow, gone, policy) if client else []
    # A version in MLflow is removed before its model, and a model before its data.
    return [*registered, *models.removals, *processed.removals, *raw.removals], processed.kept, raw.kept


def _in_use(
    data_set: DataSet, instance: dg.DagsterInstance, models: ObjectStore, serving: InferenceServiceResource
) -> set[str]:
    """Digests that are served, pinned, last recorded by Dagster, or referenced by unfinished runs or declarations."""
    in_use = {info.key.removeprefix(PINS_PREFIX) for info in models.list(PINS_PREFIX)}
    for each in (data_set, *read_data_sets(read_settings())):  # others may start from models of this one
        in_use |= find_digests(f"{each.retrain_config} {each.start_from}")
    in_use.add(serving.status().model_digest or "")
    for asset, number in _RECENT.items():
        digests = dict.fromkeys(
            made.digest for made in materializations(instance, keys.key_of(data_set, asset)) if made.digest
        )
        in_use.update(list(digests)[:number])
    for record in instance.get_run_records(dg.RunsFilter(statuses=UNFINISHED)):
        in_use |= find_digests(str(record.dagster_run.run_config))
    return in_use


def summary(removals: Iterable[Removal]) -> dict[str, str]:
    """Number and size by kind of item, and in total."""
    counts, sizes = Counter[str](), Counter[str]()
    for removal in removals:
        for kind in (removal.kind, "total"):
            counts[kind] += 1
            sizes[kind] += removal.size
    return {
        kind: f"{counts[kind]:,}, {_readable(sizes[kind])}" for kind in (*sorted(counts.keys() - {"total"}), "total")
    }


def _readable(size: float) -> str:
    """Bytes in human-readable form, such as 1.5 MB."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


class PruneConfig(Policy):
    """What to keep and whether to remove the rest."""

    apply: bool = Field(default=False, description="Remove the data; otherwise only log what would be removed.")


def prune_unused(
    data_set: DataSet,
    context: dg.OpExecutionContext,
    config: PruneConfig,
    object_store: ObjectStoreResource,
    mlflow: MlflowResource,
    serving: InferenceServiceResource,
) -> dg.Output[None]:
    """One pruning; its output metadata has the number and size by kind of item."""
    removals = prune(
        data_set, config, context.instance, object_store, mlflow, serving, apply=config.apply, say=context.log.info
    )
    return dg.Output(None, metadata={"applied": config.apply, **summary(removals)})


def build_prune_job(data_set: DataSet) -> tuple[dg.JobDefinition, dg.ScheduleDefinition]:
    """A data set's job with one op, and its schedule."""
    op = dg.op(name=data_set.named("prune_unused"), description="List unused data, and with `apply` remove it.")(
        bind(prune_unused, data_set)
    )

    @dg.job(
        name=data_set.named("prune"),
        description="Lists or removes unused versions, models, checkpoints and caches.",
        tags={"purpose": "prune"},
    )
    def prune_job() -> None:
        op()

    schedule = dg.ScheduleDefinition(
        name=data_set.named("prune_weekly"),
        job=prune_job,
        cron_schedule="0 3 * * 0",
        execution_timezone="UTC",
        run_config={"ops": {op.name: {"config": {"apply": True}}}},
        default_status=dg.DefaultScheduleStatus.STOPPED,
        description="Removes unused data every Sunday. Stopped by default.",
    )
    return prune_job, schedule
