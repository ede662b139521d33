"""How checks are declared and how they answer."""

from collections.abc import Collection, Iterator, Sequence

import dagster as dg

from cifar_assets.assets.faults import MAX_RETRIES, RETRY_SECONDS
from cifar_assets.assets.metadata import shown
from cifar_assets.assets.record import VERSION_METADATA
from cifar_assets.finding import Finding, Judges
from resources.errors import StoreError


def spec(asset: dg.AssetKey, name: str, description: str, *, blocking: bool = False) -> dg.AssetCheckSpec:
    """One check. A blocking one that fails stops what comes after it in the run."""
    return dg.AssetCheckSpec(name, asset=asset, description=description, blocking=blocking)


def answers(
    context: dg.AssetCheckExecutionContext,
    checks: Sequence[dg.AssetCheckSpec],
    version: str,
    judges: Judges,
    warnings: Collection[str] = (),
) -> Iterator[dg.AssetCheckResult]:
    """The results of the checks that the run selected, each judged apart from the others.

    A check that raises fails, with the error as its reason; only for a store that does not answer is the step tried
    again first. `version` is the data version judged, `warnings` names checks that fail as a warning.
    """
    results = []
    for check in checks:
        if check.key not in context.selected_asset_check_keys:
            continue
        try:
            finding = judges[check.name]()
        except Exception as error:
            if isinstance(error, StoreError) and error.transient and context.retry_number < MAX_RETRIES:
                raise dg.RetryRequested(MAX_RETRIES, RETRY_SECONDS) from error
            context.log.warning(f"{check.name} of {version} could not be judged", exc_info=True)
            finding = Finding(False, f"Could not be judged: {type(error).__name__}: {error}")
        results.append(_result(check, version, finding, check.name in warnings))
    yield from results


def _result(check: dg.AssetCheckSpec, version: str, finding: Finding, warns: bool) -> dg.AssetCheckResult:
    numbers = {name: shown(value) for name, value in finding.numbers.items()}
    return dg.AssetCheckResult(
        check_name=check.name,
        asset_key=check.asset_key,
        passed=bool(finding.passed),
        severity=dg.AssetCheckSeverity.WARN if warns else dg.AssetCheckSeverity.ERROR,
        description=finding.reason,
        metadata={**numbers, VERSION_METADATA: version},
    )
