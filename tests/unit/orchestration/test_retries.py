"""Which failures of an asset are retried."""

from collections.abc import Callable

import dagster as dg
import pytest
from dagster_postgres.utils import DagsterPostgresException
from mlflow.exceptions import MlflowException
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DatabaseError, InterfaceError, OperationalError, ProgrammingError, TimeoutError

from cifar_assets.assets import common
from cifar_assets.assets.common import retrying_infrastructure_faults


def lost() -> OperationalError:
    """A new error: its traceback tells which database it is of."""
    return OperationalError("INSERT", {}, ConnectionRefusedError())


def attempts(act: Callable[[dg.DagsterInstance], object]) -> tuple[bool, int]:
    """Whether a step that does this in its first attempt succeeds, and after how many attempts."""
    count = 0

    @dg.asset
    def stored(context: dg.AssetExecutionContext) -> None:
        nonlocal count
        count += 1
        with retrying_infrastructure_faults():
            if count == 1:
                act(context.instance)

    return dg.materialize([stored], raise_on_error=False).success, count


def raising(error: Exception, cause: Exception | None = None) -> Callable[[dg.DagsterInstance], None]:
    def act(instance: dg.DagsterInstance) -> None:
        raise error from cause

    return act


def losing_dagsters_database(error: Exception) -> Callable[[dg.DagsterInstance], None]:
    """The statement fails in the driver, as it does when Dagster's storage runs it."""

    def fail(*_: object, **__: object) -> None:
        raise error

    def act(instance: dg.DagsterInstance) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Connection, "execute", fail)
            instance.get_run_by_id("run")

    return act


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RETRY_SECONDS", 0)


def test_step_that_lost_dagsters_database_is_retried() -> None:
    """dagster-postgres raises this when it has tried for 12 s to store an event."""
    assert attempts(raising(DagsterPostgresException("too many retries for DB connection"), lost())) == (True, 2)


@pytest.mark.parametrize(
    "error",
    [
        lost(),
        TimeoutError("QueuePool limit of size 1 overflow 0 reached"),
        InterfaceError("SELECT", {}, ValueError("connection already closed")),
        DatabaseError("SELECT", {}, ValueError("error with status PGRES_TUPLES_OK and no message from the libpq")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_loss_of_dagsters_database_is_retried(error: Exception) -> None:
    assert attempts(losing_dagsters_database(error)) == (True, 2)


def test_database_that_refuses_a_statement_is_not_retried() -> None:
    refused = ProgrammingError("INSERT", {}, ValueError("no such column"))
    assert attempts(losing_dagsters_database(refused)) == (False, 1)


@pytest.mark.parametrize("act", [raising(lost()), raising(MlflowException("lost"), lost())], ids=["driver", "mlflow"])
def test_error_of_another_database_is_not_retried(act: Callable[[dg.DagsterInstance], None]) -> None:
    assert attempts(act) == (False, 1)
