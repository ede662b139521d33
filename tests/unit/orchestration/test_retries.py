"""Which failures of an asset are retried."""

import dagster as dg
import pytest
from dagster_postgres.utils import DagsterPostgresException
from sqlalchemy.exc import OperationalError, ProgrammingError

from cifar_assets.assets import common
from cifar_assets.assets.common import retrying_infrastructure_faults


def attempts(error: Exception) -> tuple[bool, int]:
    """Whether a step whose first attempt raises the error succeeds, and after how many attempts."""
    count = 0

    @dg.asset
    def stored() -> None:
        nonlocal count
        count += 1
        with retrying_infrastructure_faults():
            if count == 1:
                raise error

    return dg.materialize([stored], raise_on_error=False).success, count


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RETRY_SECONDS", 0)


def test_step_that_lost_dagsters_database_is_retried() -> None:
    """dagster-postgres raises this when it has tried for 12 s to store an event."""
    lost = DagsterPostgresException("too many retries for DB connection")
    lost.__cause__ = OperationalError("INSERT", {}, ConnectionRefusedError())
    assert attempts(lost) == (True, 2)


def test_database_that_refuses_a_statement_is_not_retried() -> None:
    assert attempts(ProgrammingError("INSERT", {}, ValueError("no such column"))) == (False, 1)
