"""How checks are declared and evaluated."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import dagster as dg

from cifar_assets.assets.common import MAX_RETRIES, RETRY_SECONDS
from cifar_assets.assets.keys import key_of
from cifar_assets.assets.metadata import shown
from cifar_assets.assets.record import VERSION_METADATA
from cifar_assets.data_set import DataSet
from resources.dagster_storage import is_database_outage
from resources.errors import StoreError
from resources.verdict import Judges, Verdict

_WARNS = {"severity": dg.AssetCheckSeverity.WARN.value}


def declare(
    asset: str,
    *,
    blocking: Mapping[str, str] = {},
    failing: Mapping[str, str] = {},
    warning: Mapping[str, str] = {},
    awaited: bool = False,
) -> Callable[[DataSet], list[dg.AssetCheckSpec]]:
    """Checks of an asset by name with descriptions. A failed check blocks the run, is an error, or is a warning.

    If `awaited`, the downstream assets of a run wait for the warnings, which do not block them.
    """

    def specs(data_set: DataSet) -> list[dg.AssetCheckSpec]:
        key = key_of(data_set, asset)
        return [
            *(dg.AssetCheckSpec(name, asset=key, description=text, blocking=True) for name, text in blocking.items()),
            *(dg.AssetCheckSpec(name, asset=key, description=text) for name, text in failing.items()),
            *(
                dg.AssetCheckSpec(name, asset=key, description=text, metadata=_WARNS, blocking=awaited)
                for name, text in warning.items()
            ),
        ]

    return specs


def answers(
    context: dg.AssetCheckExecutionContext, checks: Sequence[dg.AssetCheckSpec], version: str, judges: Judges
) -> Iterator[dg.AssetCheckResult]:
    """Results of the selected checks for a data version, each evaluated independently of the others.

    A check that raises fails with the error as its reason, but if the store or Dagster's database does not
    respond the step is retried first.
    """
    results = []
    for check in checks:
        if check.key not in context.selected_asset_check_keys:
            continue
        try:
            verdict = judges[check.name]()
        except Exception as error:
            is_external = (isinstance(error, StoreError) and error.transient) or is_database_outage(error)
            if is_external and context.retry_number < MAX_RETRIES:
                raise dg.RetryRequested(MAX_RETRIES, RETRY_SECONDS) from error
            context.log.warning(f"{check.name} of {version} could not be evaluated", exc_info=True)
            verdict = Verdict(False, f"Could not be evaluated: {type(error).__name__}: {error}")
        results.append(
            dg.AssetCheckResult(
                check_name=check.name,
                asset_key=check.asset_key,
                passed=bool(verdict.passed),
                severity=dg.AssetCheckSeverity(check.metadata.get("severity", dg.AssetCheckSeverity.ERROR.value)),
                description=verdict.reason,
                metadata={**{name: shown(value) for name, value in verdict.numbers.items()}, VERSION_METADATA: version},
            )
        )
    yield from results
