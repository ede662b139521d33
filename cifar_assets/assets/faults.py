"""Which faults are worth another try, and how the others are shown."""

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg

from resources.errors import ExplainedError

MAX_RETRIES = 2
RETRY_SECONDS = 10.0


@contextmanager
def retrying_infrastructure_faults() -> Iterator[None]:
    """Ask for a retry where the cause lies outside (a store that does not answer, a node that died); otherwise fail.

    A RetryPolicy on the asset would do the same, but it also starts a step again that a person cancelled.
    """
    try:
        yield
    except (ExplainedError, dg.Failure) as error:
        failed = isinstance(error, dg.Failure)
        if error.allow_retries if failed else getattr(error, "transient", False):
            raise dg.RetryRequested(MAX_RETRIES, RETRY_SECONDS) from error
        if failed:
            raise
        raise dg.Failure(str(error), allow_retries=False) from error
