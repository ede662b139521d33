"""Interrupts of a step: whether somebody cancelled its run, and calls whose answer an interrupt has to wait for."""

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg
from dagster._core.errors import DagsterExecutionInterruptedError
from dagster._utils.interrupts import capture_interrupts, check_captured_interrupt

StepContext = dg.OpExecutionContext | dg.AssetExecutionContext


def is_being_cancelled(context: StepContext) -> bool:
    """Whether the run is cancelled, and not merely its process told to stop."""
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
        raise DagsterExecutionInterruptedError() from error
    if error:
        raise error
