"""Which faults a retry can mend, and how the others are shown."""

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg

from resources.errors import DeployError, ExplainedError, StoreError, TrainingError

MAX_RETRIES = 2
RETRY_SECONDS = 10.0


@contextmanager
def retrying_infrastructure_faults() -> Iterator[None]:
    """Ask for a retry where the cause lies outside (a store that does not answer, a node that died); otherwise fail.

    A RetryPolicy on the asset would do the same, but it also starts a step again that a person cancelled.
    """
    try:
        yield
    except ExplainedError as error:
        if _is_transient(error):
            raise dg.RetryRequested(MAX_RETRIES, RETRY_SECONDS) from error
        raise dg.Failure(str(error), allow_retries=False) from error
    except dg.Failure as failure:
        if failure.allow_retries:
            raise dg.RetryRequested(MAX_RETRIES, RETRY_SECONDS) from failure
        raise


def _is_transient(error: ExplainedError) -> bool:
    return isinstance(error, StoreError | TrainingError | DeployError) and error.transient
