"""How checks are declared and how they answer."""

from collections.abc import Iterable, Iterator

import dagster as dg


def spec(asset: dg.AssetKey, name: str, description: str, *, blocking: bool = False) -> dg.AssetCheckSpec:
    """One check. A blocking one that fails with severity ERROR keeps the rest of the run from going on."""
    return dg.AssetCheckSpec(name, asset=asset, description=description, blocking=blocking)


def result(
    asset: dg.AssetKey,
    name: str,
    passed: bool,
    description: str,
    *,
    severity: dg.AssetCheckSeverity = dg.AssetCheckSeverity.ERROR,
    **metadata: float | str,
) -> dg.AssetCheckResult:
    """A verdict with one sentence that gives what was found and what was allowed."""
    return dg.AssetCheckResult(
        check_name=name,
        asset_key=asset,
        passed=bool(passed),
        severity=severity,
        description=description,
        metadata=metadata,
    )


WARN = dg.AssetCheckSeverity.WARN


def only_selected(
    context: dg.AssetCheckExecutionContext, results: Iterable[dg.AssetCheckResult]
) -> Iterator[dg.AssetCheckResult]:
    """The results that were asked for, so that a single check can be executed from the UI."""
    selected = {key.name for key in context.selected_asset_check_keys}
    return (result for result in results if result.check_name in selected)
