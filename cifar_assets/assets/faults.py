"""Which faults a retry can mend, and how the others are shown."""

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg

from cifar_assets.errors import CifarError, ObjectNotFoundError, StoreError, TrainingError

INFRASTRUCTURE_RETRIES = dg.RetryPolicy(max_retries=2, delay=10, backoff=dg.Backoff.EXPONENTIAL)
"""For assets: what escapes `final_faults` is tried again, a store that does not answer or a job whose node died."""


@contextmanager
def final_faults() -> Iterator[None]:
    """Turn faults that would recur (config, data, a training that fails by itself) into failures without a retry."""
    try:
        yield
    except CifarError as error:
        if _is_transient(error):
            raise
        raise dg.Failure(str(error), allow_retries=False) from error


def _is_transient(error: CifarError) -> bool:
    if isinstance(error, TrainingError):
        return error.transient
    return isinstance(error, StoreError) and not isinstance(error, ObjectNotFoundError)
