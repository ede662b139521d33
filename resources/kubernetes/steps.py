"""A Dagster step that owns an object of a cluster: its interrupts, its clean-up, and its failures as Dagster's."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import dagster as dg

from resources.dagster_private import capture_interrupts, check_captured_interrupt
from resources.kubernetes.diagnosis import Diagnosis
from resources.kubernetes.errors import KubernetesError, ResourceFailedError, added_to, with_notes
from resources.redaction import redacted

StepContext = dg.OpExecutionContext | dg.AssetExecutionContext


def is_being_cancelled(context: StepContext) -> bool:
    """Whether the run is cancelled. A process that is merely asked to stop may belong to a run that continues."""
    run = context.instance.get_run_by_id(context.run.run_id)
    return run is not None and run.status in (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED)


@contextmanager
def interrupts_after() -> Iterator[None]:
    """Holds an interrupt back until the block has ended, then raises it in place of the block's own error."""
    error: Exception | None = None
    with capture_interrupts():
        try:
            yield
        except Exception as raised:
            error = raised
        interrupted = check_captured_interrupt()
    if interrupted:
        raise dg.DagsterExecutionInterruptedError() from error
    if error:
        raise error


def cancelled_failure() -> dg.Failure:
    """How a step of a cancelled run ends where Dagster would answer the interrupt itself with a retry."""
    return dg.Failure("The run was cancelled: this step starts nothing in the cluster.", allow_retries=False)


@contextmanager
def removing(context: StepContext, what: str, remove: Callable[[], None]) -> Iterator[None]:
    """Calls `remove` when the run was cancelled, and when the object was given up.

    Any other interrupt leaves the object to the step's next attempt. An error of the clean-up is added to the first.
    """
    try:
        yield
    except (dg.DagsterExecutionInterruptedError, KeyboardInterrupt) as interrupt:
        cancelled = False
        with capture_interrupts(), added_to(interrupt, context.log):  # a second signal must not stop the clean-up
            cancelled = is_being_cancelled(context)
            if cancelled:
                remove()
                context.log.info(f"{what} and what it owns are gone.")
            else:
                context.log.info(
                    f"This process was asked to stop, but the run was not cancelled: {what} continues, and the step's "
                    "next attempt adopts it."
                )
        if cancelled and context.get_step_execution_context().op_retry_policy:
            raise cancelled_failure() from interrupt
        raise
    except ResourceFailedError as error:
        if error.diagnosis.remove:
            with added_to(error, context.log):
                remove()
        raise


@contextmanager
def as_dagster_failure() -> Iterator[None]:
    """Turns what goes wrong with an object or the cluster into dg.Failure, with what is known as metadata."""
    try:
        yield
    except KubernetesError as error:
        metadata = _metadata(error.diagnosis) if isinstance(error, ResourceFailedError) else {}
        raise dg.Failure(with_notes(error), metadata, allow_retries=error.transient) from error


def _metadata(diagnosis: Diagnosis) -> Mapping[str, Any]:
    logs = {
        f"log of {where}": dg.MetadataValue.md(redacted("\n".join(["```", *tail, "```"])))
        for where, tail in diagnosis.log_tails.items()
    }
    exit_code = {} if diagnosis.exit_code is None else {"exit_code": diagnosis.exit_code}
    return {"cause": str(diagnosis.cause), "summary": redacted(diagnosis.summary), **exit_code, **logs}
