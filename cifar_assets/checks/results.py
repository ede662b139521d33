"""How checks are declared and how they answer."""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import ParamSpec, cast

import dagster as dg

P = ParamSpec("P")


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


def only_selected(verdicts: Callable[P, Iterator[dg.AssetCheckResult]]) -> Callable[P, Iterator[dg.AssetCheckResult]]:
    """Decorator of a multi_asset_check's function, whose first parameter is `context`.

    Keeps the results that were asked for, so that a single check can be executed from the UI.
    """

    @wraps(verdicts)
    def selected(*args: P.args, **kwargs: P.kwargs) -> Iterator[dg.AssetCheckResult]:
        context = cast("dg.AssetCheckExecutionContext", args[0])
        names = {key.name for key in context.selected_asset_check_keys}
        yield from (found for found in verdicts(*args, **kwargs) if found.check_name in names)

    return selected
