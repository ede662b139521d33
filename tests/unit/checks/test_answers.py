"""Each check gives a verdict for any data, independently of the others."""

from collections.abc import Callable

import dagster as dg
import pytest
from dagster_postgres.utils import DagsterPostgresException
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import OperationalError

from cifar_assets.assets import common
from cifar_assets.assets.record import VERSION_METADATA
from cifar_assets.checks import results
from cifar_assets.checks.results import answers, declare
from resources.errors import ConfigError, DataError, ObjectNotFoundError, StoreError
from resources.verdict import Verdict
from tests.fixtures.cifar10 import DATA_SET

KEY = dg.AssetKey([DATA_SET.name, "data"])
CHECKS = declare(
    "data", blocking={"first": "blocks"}, warning={"second": "warns"}, failing={"third": "fails"}, awaited=True
)(DATA_SET)


def good() -> Verdict:
    return Verdict(True, "fine", {"number": 1.5, "odd": float("nan")})


def run(second: Callable[[], Verdict], names: tuple[str, ...] = ("first", "second", "third")) -> tuple[bool, dict]:
    """Whether the asset downstream of the checks was reached, and the evaluations by name."""

    @dg.asset(key=KEY)
    def data() -> None: ...

    @dg.asset(deps=[KEY])
    def behind() -> None: ...

    @dg.multi_asset_check(specs=CHECKS, can_subset=True)
    def checks(context: dg.AssetCheckExecutionContext):
        judges = {"first": good, "second": second, "third": good}
        yield from answers(context, CHECKS, "v1", judges)

    selection = dg.AssetSelection.assets(data, behind).without_checks() | dg.AssetSelection.checks(
        *(dg.AssetCheckKey(KEY, name) for name in names)
    )
    definitions = dg.Definitions(
        assets=[data, behind], asset_checks=[checks], jobs=[dg.define_asset_job("all", selection)]
    )
    result = definitions.resolve_job_def("all").execute_in_process(raise_on_error=False)
    reached = bool(result.asset_materializations_for_node("behind"))
    return reached, {each.check_name: each for each in result.get_asset_check_evaluations()}


@pytest.mark.parametrize(
    "error",
    [KeyError("gone"), TypeError("None < 0.4"), DataError("bad"), ObjectNotFoundError("gone"), ZeroDivisionError()],
    ids=lambda error: type(error).__name__,
)
def test_a_check_that_raises_fails_and_stops_no_other(error: Exception) -> None:
    def raises() -> Verdict:
        raise error

    reached, found = run(raises)
    assert reached
    assert {name: evaluation.passed for name, evaluation in found.items()} == {
        "first": True,
        "second": False,
        "third": True,
    }
    assert f"{type(error).__name__}: {error}" in found["second"].description
    assert found["second"].severity == dg.AssetCheckSeverity.WARN


def test_a_verdict_names_the_version_and_holds_no_nan() -> None:
    _, found = run(good)
    metadata = {name: value.value for name, value in found["second"].metadata.items()}
    assert metadata == {"number": 1.5, "odd": "nan", VERSION_METADATA: "v1"}


def test_only_the_selected_checks_are_judged() -> None:
    def never() -> Verdict:
        raise AssertionError

    _, found = run(never, names=("first",))
    assert list(found) == ["first"]


@pytest.mark.parametrize(("failures", "passed"), [(1, True), (99, False)])
def test_a_store_that_does_not_answer_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, failures: int, passed: bool
) -> None:
    monkeypatch.setattr(results, "RETRY_SECONDS", 0.0)
    calls = []

    def away() -> Verdict:
        calls.append(1)
        if len(calls) <= failures:
            raise StoreError("no answer", transient=True)
        return good()

    reached, found = run(away)
    assert reached
    assert found["second"].passed is passed
    assert len(calls) == (2 if passed else common.MAX_RETRIES + 1)


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


READ_ONLY = OperationalError("UPDATE", {}, ValueError("attempt to write a readonly database"))
OF_MLFLOW = caused(MlflowException("readonly database"), READ_ONLY)


@pytest.mark.parametrize(
    ("error", "num_attempts"),
    [
        (DagsterPostgresException("too many retries for DB connection"), common.MAX_RETRIES + 1),
        (OF_MLFLOW, 1),
        (caused(ConfigError("MLflow refused: readonly database"), OF_MLFLOW), 1),
    ],
    ids=["dagster", "mlflow", "explained"],
)
def test_only_the_loss_of_dagsters_own_database_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, error: Exception, num_attempts: int
) -> None:
    monkeypatch.setattr(results, "RETRY_SECONDS", 0.0)
    calls = []

    def refuse() -> Verdict:
        calls.append(1)
        raise error

    _, found = run(refuse)
    assert found["second"].passed is False
    assert len(calls) == num_attempts
