"""Versions of an asset according to Dagster's event log, and the results of their blocking checks.

A digest proves that bytes are unchanged, not where they came from. Anyone with write access to the buckets can store
their own package under a matching digest, but cannot write to Dagster's event log.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import dagster as dg

from resources.errors import ConfigError
from resources.step_context import StepContext

DATA_VERSION_TAG = "dagster/data_version"
VERSION_METADATA = "checked_version"
"""Metadata key of a check evaluation: the data version that was judged."""
RECENT = 100
"""How many materializations are searched for a run's own, for earlier versions, and for a training to reuse."""

ENDED = (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)
UNFINISHED = [status for status in dg.DagsterRunStatus if status not in ENDED]
"""Statuses of runs that have not ended."""
_PAGE = 50


class Made(NamedTuple):
    """One materialization, its run, its data version (None if it was reported without one), and when it was made."""

    materialization: dg.AssetMaterialization
    run_id: str
    digest: str | None
    timestamp: float


def materializations(instance: dg.DagsterInstance, key: dg.AssetKey, limit: int | None = RECENT) -> Iterator[Made]:
    """Materializations of the asset, newest first, read page by page."""
    num_found, cursor, has_more = 0, None, True
    while has_more:
        page = instance.fetch_materializations(key, limit=_PAGE, cursor=cursor)
        for record in page.records:
            if made := record.asset_materialization:
                yield Made(made, record.run_id, (made.tags or {}).get(DATA_VERSION_TAG), record.timestamp)
                num_found += 1
                if num_found == limit:
                    return
        cursor, has_more = page.cursor, page.has_more


def data_version(materialization: dg.AssetMaterialization) -> str:
    """The data version of a materialization. ConfigError if it has none, such as one reported manually."""
    version = (materialization.tags or {}).get(DATA_VERSION_TAG)
    if not version:
        raise ConfigError(
            f"The last materialization of {materialization.asset_key.to_user_string()} has no data version: "
            "materialize the asset again."
        )
    return version


def current_materialization(
    context: StepContext | dg.AssetCheckExecutionContext, key: dg.AssetKey
) -> dg.AssetMaterialization:
    """The materialization that this run made, otherwise the newest one.

    A run that materialized its own upstream asset must not use one that another run made in the meantime. Raises
    ConfigError when the asset was never materialized.
    """
    recent = list(materializations(context.instance, key))
    if not recent:
        raise ConfigError(
            f"{key.to_user_string()} has no materialization: materialize it first, or set the digest in this asset's "
            "config."
        )
    return next((made for made in recent if made.run_id == context.run.run_id), recent[0]).materialization


def materialized_digest(context: StepContext | dg.AssetCheckExecutionContext, key: dg.AssetKey) -> str:
    """The data version of `current_materialization`."""
    return data_version(current_materialization(context, key))


def previous_digests(instance: dg.DagsterInstance, key: dg.AssetKey) -> list[str]:
    """Distinct data versions of the asset's last materializations, newest first."""
    return list(dict.fromkeys(data_version(made.materialization) for made in materializations(instance, key)))


def find_materialization(instance: dg.DagsterInstance, key: dg.AssetKey, digest: str) -> Made | None:
    """The newest materialization of the asset with this data version, however long ago it was."""
    if not instance.event_log_storage.get_event_tags_for_asset(key, {DATA_VERSION_TAG: digest}):
        return None  # uses an index; the code below reads materializations one by one
    return next((made for made in materializations(instance, key, limit=None) if made.digest == digest), None)


def evaluations(instance: dg.DagsterInstance, check: dg.AssetCheckKey) -> Iterator[tuple[dg.AssetCheckEvaluation, str]]:
    """Evaluations of the check with their run ids, newest first."""
    cursor = None
    while page := instance.event_log_storage.get_asset_check_execution_history(check, limit=_PAGE, cursor=cursor):
        for record in page:
            event = record.event.dagster_event if record.event else None
            if event and event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION:  # others are only planned
                yield event.asset_check_evaluation_data, record.run_id
        cursor = page[-1].id


def why_unproven(
    instance: dg.DagsterInstance, key: dg.AssetKey, digest: str, checks: Iterable[dg.AssetCheckSpec]
) -> list[str]:
    """Why the event log does not prove the version: not materialized here, or a blocking check is missing or failed.

    The newest evaluation of each check counts. Empty if the version is proven.
    """
    name = key.to_user_string()
    if find_materialization(instance, key, digest) is None:
        return [f"this Dagster instance never materialized {name} as {digest}"]
    reasons = []
    for check in (check for check in checks if check.blocking):
        of_version = (
            (each, run) for each, run in evaluations(instance, check.key) if _judged(instance, each) == digest
        )
        evaluation, run_id = next(of_version, (None, None))
        if evaluation is None:
            reasons.append(f"the blocking check {check.name} of {name} never ran on {digest}")
        elif not evaluation.passed:
            reasons.append(
                f"the blocking check {check.name} of {name} failed for {digest} in run {run_id} "
                f"({evaluation.description or 'no description'})"
            )
    return reasons


def _judged(instance: dg.DagsterInstance, evaluation: dg.AssetCheckEvaluation) -> str | None:
    """The version a check judged: the one in its metadata, otherwise that of its target materialization in Dagster.

    The two differ if another run materialized the asset between this run's materialization and its check.
    """
    if named := evaluation.metadata.get(VERSION_METADATA):
        return str(named.value)
    target = evaluation.target_materialization_data
    if target is None:
        return None
    wanted = dg.AssetRecordsFilter(asset_key=evaluation.asset_key, storage_ids=[target.storage_id])
    for record in instance.fetch_materializations(wanted, limit=1).records:
        if record.asset_materialization:
            return (record.asset_materialization.tags or {}).get(DATA_VERSION_TAG)
    return None
