"""A Dagster step that owns a job in a cluster: interrupts, cleanup, and failures as dg.Failure."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import dagster as dg

from resources.dagster_private import (
    ASSET_RESUME_RETRY_TAG,
    RESUME_RETRY_TAG,
    capture_interrupts,
    check_captured_interrupt,
)
from resources.kubernetes.diagnosis import Diagnosis
from resources.kubernetes.errors import KubernetesError, ResourceFailedError, added_to, with_notes
from resources.kubernetes.job import J, Job, JobClient
from resources.kubernetes.launch import JobLauncher, JobRequest, Started
from resources.pipes_reader import MessagesLostError
from resources.redaction import redacted
from resources.step_context import StepContext

_MAX_ANCESTORS = 64
_CANCEL_GRACE_SECONDS = 5
_CANCEL_TIMEOUT_SECONDS = 25.0
"""Shorter than the grace period of a run worker's pod."""


def job_request(
    context: StepContext, kind: type[Job], *, namespace: str, prefix: str, work: str, name: str | None = None
) -> JobRequest:
    """The job that this attempt at the step requests. `work` identifies its work; `name` replaces the generated one."""
    run_id, step_key = context.run.run_id, context.get_step_execution_context().step.key
    return JobRequest(
        kind,
        name or kind.name_for(prefix, run_id=run_id, step_key=step_key, attempt=context.retry_number),
        namespace=namespace,
        step_key=step_key,
        run_id=run_id,
        ancestor_run_ids=_retried_runs(context),
        work=hashlib.sha256(work.encode()).hexdigest(),
    )


@contextmanager
def owned_job(
    context: StepContext,
    client: JobClient[J],
    request: JobRequest,
    manifest: Mapping[str, Any],
    **options: Any,
) -> Iterator[Started[J]]:
    """The step's job, started or adopted. It is removed if the run is canceled or the block abandons it.

    Any other interrupt leaves it to the step's next attempt. A cleanup error is added to the first error. `options` are
    those of the launcher.
    """
    if is_being_cancelled(context):
        raise _cancelled_failure()
    launcher = JobLauncher(client, shield=interrupts_after, logger=context.log, **options)

    def remove() -> None:
        launcher.remove(request, grace_seconds=_CANCEL_GRACE_SECONDS, timeout_seconds=_CANCEL_TIMEOUT_SECONDS)

    try:
        yield launcher.start(request, manifest)
    except (dg.DagsterExecutionInterruptedError, KeyboardInterrupt) as interrupt:
        # run cancelled   step has a retry policy   the job    how the step ends
        # no              either                    stays      by the interrupt; the next attempt adopts the job
        # yes             no                        removed    by the interrupt
        # yes             yes                       removed    by dg.Failure: Dagster would retry after an interrupt
        cancelled = False
        with capture_interrupts(), added_to(interrupt, context.log):  # a second signal must not stop the cleanup
            cancelled = is_being_cancelled(context)
            if cancelled:
                remove()
                context.log.info(f"{request} and its pods are gone.")
            else:
                context.log.info(
                    f"This process was asked to stop, but the run was not canceled: {request} continues, and the "
                    "step's next attempt adopts it."
                )
        if cancelled and context.get_step_execution_context().op_retry_policy:
            raise _cancelled_failure() from interrupt
        raise
    except ResourceFailedError as error:
        if error.diagnosis.remove:
            with added_to(error, context.log):
                remove()
        raise


@contextmanager
def as_dagster_failure() -> Iterator[None]:
    """Turns errors of an object or the cluster into dg.Failure, with the diagnosis as metadata."""
    try:
        yield
    except (KubernetesError, MessagesLostError) as error:
        metadata = _metadata(error.diagnosis) if isinstance(error, ResourceFailedError) else {}
        raise dg.Failure(with_notes(error), metadata, allow_retries=error.transient) from error


@contextmanager
def interrupts_after() -> Iterator[None]:
    """Delays an interrupt until the end of the block, then raises it instead of the block's error."""
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


def is_being_cancelled(context: StepContext) -> bool:
    """Whether the run is canceled. A process that was only asked to stop may belong to a run that continues."""
    run = context.instance.get_run_by_id(context.run.run_id)
    return run is not None and run.status in (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED)


def _cancelled_failure() -> dg.Failure:
    """Ends a step of a canceled run for which Dagster would retry after the interrupt."""
    return dg.Failure("The run was canceled: this step starts nothing in the cluster.", allow_retries=False)


def _retried_runs(context: StepContext) -> tuple[str, ...]:
    """Runs that this one retries from failure, nearest first. Any other re-execution starts from scratch."""
    runs: list[str] = []
    run: dg.DagsterRun | None = context.run
    while run and run.parent_run_id and run.parent_run_id not in runs and len(runs) < _MAX_ANCESTORS:
        if "true" not in (run.tags.get(RESUME_RETRY_TAG), run.tags.get(ASSET_RESUME_RETRY_TAG)):
            break
        runs.append(run.parent_run_id)
        run = context.instance.get_run_by_id(run.parent_run_id)
    return tuple(runs)


def _metadata(diagnosis: Diagnosis) -> Mapping[str, Any]:
    logs = {
        f"log of {where}": dg.MetadataValue.md(redacted("\n".join(["```", *tail, "```"])))
        for where, tail in diagnosis.log_tails.items()
    }
    exit_code = {} if diagnosis.exit_code is None else {"exit_code": diagnosis.exit_code}
    return {"cause": str(diagnosis.cause), "summary": redacted(diagnosis.summary), **exit_code, **logs}
