"""What the assets share: the gate's threshold, and which faults are worth another try."""

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg
from pydantic import Field

from resources.errors import ExplainedError

MAX_RETRIES = 2
RETRY_SECONDS = 10.0


class AccuracyGate(dg.ConfigurableResource):
    """The same resource serves the asset check and the deployment, so that both use one threshold."""

    threshold: float = Field(
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Lowest test accuracy, as a fraction from 0 to 1, of a model that may be served. Equality passes.",
    )


@contextmanager
def retrying_infrastructure_faults() -> Iterator[None]:
    """Ask for a retry where the cause lies outside (a store that does not answer, a node that died); otherwise fail.

    A RetryPolicy on the asset would do the same, but it also starts a step again that a person cancelled.
    """
    try:
        yield
    except dg.Failure as failure:
        if failure.allow_retries:
            raise dg.RetryRequested(MAX_RETRIES, RETRY_SECONDS) from failure
        raise
    except ExplainedError as error:
        if error.transient:
            raise dg.RetryRequested(MAX_RETRIES, RETRY_SECONDS) from error
        raise dg.Failure(str(error), allow_retries=False) from error
