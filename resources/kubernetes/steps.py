"""A Dagster step that owns a job of a cluster: its interrupts, its clean-up, and its failures as Dagster's."""

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
from resources.redaction import redacted

StepContext = dg.OpExecutionContext | dg.AssetExecutionContext

_MAX_ANCESTORS = 64
_CANCEL_GRACE_SECONDS = 5
_CANCEL_TIMEOUT_SECONDS = 25.0
"""Shorter than the time that Kubernetes gives a run worker to end."""


def job_request(
    context: StepContext, kind: type[Job], *, namespace: str, prefix: str, work: str, name: str | None = None
) -> JobRequest:
    """The job that this attempt at the step wants. `work` identifies what it computes; `name` replaces its own."""
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
    """The step's job, started or adopted. It is removed when the run is cancelled, and when the block gives it up.

    Any other interrupt leaves it to the step's next attempt. An error of the clean-up is added to the first. `options`
    are those of the launcher.
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
        with capture_interrupts(), added_to(interrupt, context.log):  # a second signal must not stop the clean-up
            cancelled = is_being_cancelled(context)
            if cancelled:
                remove()
                context.log.info(f"{request} and its pods are gone.")
            else:
                context.log.info(
                    f"This process was asked to stop, but the run was not cancelled: {request} continues, and the "
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
    """Turns what goes wrong with an object or the cluster into dg.Failure, with what is known as metadata."""
    try:
        yield
    except KubernetesError as error:
        metadata = _metadata(error.diagnosis) if isinstance(error, ResourceFailedError) else {}
        raise dg.Failure(with_notes(error), metadata, allow_retries=error.transient) from error


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


def is_being_cancelled(context: StepContext) -> bool:
    """Whether the run is cancelled. A process that is merely asked to stop may belong to a run that continues."""
    run = context.instance.get_run_by_id(context.run.run_id)
    return run is not None and run.status in (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED)


def _cancelled_failure() -> dg.Failure:
    """How a step of a cancelled run ends where Dagster would answer the interrupt itself with a retry."""
    return dg.Failure("The run was cancelled: this step starts nothing in the cluster.", allow_retries=False)


def _retried_runs(context: StepContext) -> tuple[str, ...]:
    """Runs that this one retries from failure, nearest first. Any other re-execution starts over."""
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
