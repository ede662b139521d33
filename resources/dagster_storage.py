"""Errors of Dagster's own database."""

import traceback

from sqlalchemy.exc import DatabaseError, InterfaceError, OperationalError, TimeoutError

_STORAGES = ("dagster._core.storage.", "dagster_postgres.")


def is_database_outage(error: BaseException) -> bool:
    """Whether Dagster's database was lost while it stored or read something: the step may be retried.

    An error of another database, such as MLflow's, does not count, nor does a refused statement. dagster-postgres
    repeats only some calls, and raises its own error after 12 s (dagster#21209); of the others, the driver's error
    arrives unchanged.
    """
    if type(error).__name__ == "DagsterPostgresException":  # by name: a laptop has no dagster-postgres
        return True
    # a plain DatabaseError is a connection that broke within a response; its other subclasses are refused statements
    if not isinstance(error, (OperationalError, InterfaceError, TimeoutError)) and type(error) is not DatabaseError:
        return False
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__", "").startswith(_STORAGES) for frame, _ in frames)
