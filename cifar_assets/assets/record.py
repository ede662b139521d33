"""What Dagster's own record says of a version: that this instance materialized it, and how its blocking checks went.

A digest proves that bytes are unchanged, not where they came from. Whoever can write to the buckets can store a package
of their own with a digest that fits; they cannot write to Dagster's event log.
"""

from collections.abc import Iterable, Iterator

import dagster as dg

from cifar_assets.assets.upstream import DATA_VERSION_TAG

VERSION_METADATA = "checked_version"
"""Metadata of a check evaluation: the data version that was judged."""

_PAGE = 50


def find_materialization(instance: dg.DagsterInstance, key: dg.AssetKey, digest: str) -> dg.EventLogRecord | None:
    """The newest materialization of the asset with this data version."""
    if not instance.event_log_storage.get_event_tags_for_asset(key, {DATA_VERSION_TAG: digest}):
        return None  # by an index; what follows reads materializations one by one
    for record in _materializations(instance, key):
        found = record.asset_materialization
        if found and (found.tags or {}).get(DATA_VERSION_TAG) == digest:
            return record
    return None


def why_unproven(
    instance: dg.DagsterInstance, key: dg.AssetKey, digest: str, checks: Iterable[dg.AssetCheckSpec]
) -> list[str]:
    """Why the record does not vouch for the version: never materialized here, or a blocking check missing or failed.

    The newest evaluation of each check counts. Empty when all is well.
    """
    name = key.to_user_string()
    if find_materialization(instance, key, digest) is None:
        return [f"this Dagster instance never materialized {name} as {digest}"]
    reasons = []
    for check in checks:
        if not check.blocking:
            continue
        found = _newest_evaluation(instance, check.key, digest)
        if found is None:
            reasons.append(f"the blocking check {check.name} of {name} never ran on {digest}")
        elif not found[0].passed:
            reasons.append(
                f"the blocking check {check.name} of {name} failed for {digest} in run {found[1]} "
                f"({found[0].description or 'no description'})"
            )
    return reasons


def _newest_evaluation(
    instance: dg.DagsterInstance, check: dg.AssetCheckKey, digest: str
) -> tuple[dg.AssetCheckEvaluation, str] | None:
    cursor = None
    while True:
        page = instance.event_log_storage.get_asset_check_execution_history(check, limit=_PAGE, cursor=cursor)
        for record in page:
            event = record.event.dagster_event if record.event else None
            if event is None or event.event_type != dg.DagsterEventType.ASSET_CHECK_EVALUATION:
                continue  # planned only
            if _judged_version(instance, event.asset_check_evaluation_data) == digest:
                return event.asset_check_evaluation_data, record.run_id
        if len(page) < _PAGE:
            return None
        cursor = page[-1].id


def _judged_version(instance: dg.DagsterInstance, evaluation: dg.AssetCheckEvaluation) -> str | None:
    """The version a check judged: the one it names, or that of the materialization Dagster says it targets.

    The two differ where another run materialized the asset between this run's materialization and its check.
    """
    named = evaluation.metadata.get(VERSION_METADATA)
    if named is not None:
        return str(named.value)
    target = evaluation.target_materialization_data
    if target is None:
        return None
    wanted = dg.AssetRecordsFilter(asset_key=evaluation.asset_key, storage_ids=[target.storage_id])
    for record in instance.fetch_materializations(wanted, limit=1).records:
        if record.asset_materialization:
            return (record.asset_materialization.tags or {}).get(DATA_VERSION_TAG)
    return None


def _materializations(instance: dg.DagsterInstance, key: dg.AssetKey) -> Iterator[dg.EventLogRecord]:
    """All of them, newest first, page by page."""
    cursor = None
    while True:
        page = instance.fetch_materializations(key, limit=_PAGE, cursor=cursor)
        yield from page.records
        if not page.has_more:
            return
        cursor = page.cursor
