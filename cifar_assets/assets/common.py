"""Shared by the assets: the gate's threshold, and the rule for which failures are retried."""

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg
from pydantic import Field

from cifar_assets.model_package import WantedPrecision
from resources.dagster_storage import is_database_outage
from resources.errors import ExplainedError

MAX_RETRIES = 2
RETRY_SECONDS = 10.0


class AccuracyGate(dg.ConfigurableResource):
    """The asset check and the deployment use this one resource, so both apply the same threshold."""

    threshold: float | None = Field(
        default=None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Lowest test accuracy, as a fraction from 0 to 1, of a model that may be served. Equality passes. "
        "Without it, see ACCURACY_THRESHOLD.",
    )
    precision: WantedPrecision = Field(
        default="auto",
        description="Precision to serve in: float32, int8, or auto, which is int8 if it is about as accurate.",
    )
    public_keys: str | None = Field(
        default=None, description="Keys in PEM. With them, a model is served only if one of them signed its package."
    )


@contextmanager
def retrying_infrastructure_faults() -> Iterator[None]:
    """Request a retry if the cause is external (no response of a store or database, a lost node); otherwise fail.

    A RetryPolicy on the asset would do the same, but would also restart a step that a user canceled.
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
    except Exception as error:
        if is_database_outage(error):
            raise dg.RetryRequested(MAX_RETRIES, RETRY_SECONDS) from error
        raise
