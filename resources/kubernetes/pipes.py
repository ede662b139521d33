"""The Dagster Pipes client of a kind that runs pods to an end: one step, one job."""

import hashlib
import json
import time
from abc import ABC
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

import dagster as dg
from dagster_k8s.utils import detect_current_namespace, get_common_labels, sanitize_k8s_label
from dagster_pipes import PipesExtras
from pydantic import BaseModel

from resources.dagster_private import (
    ASSET_RESUME_RETRY_TAG,
    RESUME_RETRY_TAG,
    TreatAsResourceParam,
    find_latest_launch_handle,
    record_external_launch,
    record_external_reattach,
)
from resources.interrupts import sleep
from resources.kubernetes.diagnosis import WatchLimits
from resources.kubernetes.errors import ResourceFailedError, added_to
from resources.kubernetes.job import Job, JobClient, JobLauncher, JobRequest, JobWatcher
from resources.kubernetes.launch import Started
from resources.kubernetes.logs import LogLine, show_line
from resources.kubernetes.messages import OnMessage, PipesStoreMessageReader
from resources.kubernetes.steps import (
    StepContext,
    as_dagster_failure,
    cancelled_failure,
    interrupts_after,
    is_being_cancelled,
    removing,
)
from resources.object_store import ObjectStore

C = TypeVar("C", bound=BaseModel)

_MAX_ANCESTORS = 64
_CANCEL_GRACE_SECONDS = 5
_CANCEL_TIMEOUT_SECONDS = 25.0
"""Shorter than the time that Kubernetes gives a run worker to end."""
_DRAIN_TIMEOUT_SECONDS = 300.0


class PipesJobClient(dg.PipesClient, TreatAsResourceParam, ABC, Generic[C]):
    """Runs a step's work as a job of one kind and waits for it. A kind sets the three class attributes.

    Messages travel through `message_store`, which the pods reach by its URI and the credentials in their environment.
    A cancelled run deletes its job; a run worker that is evicted or killed leaves it, and the step's next attempt
    adopts it. `client` and `namespace` are by default those of the pod or kubeconfig; `clock` is monotonic.
    """

    client_class: ClassVar[type[JobClient[Any]]]
    build_name: ClassVar[Callable[..., str]]
    """Called with the prefix, run_id, step_key and attempt."""
    build_manifest: ClassVar[Callable[..., dict[str, Any]]]
    """Called with the config, name, namespace, env, labels and annotations."""

    def __init__(
        self,
        *,
        message_store: ObjectStore,
        client: JobClient[Any] | None = None,
        namespace: str | None = None,
        limits: WatchLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleeper: Callable[[float], None] = sleep,
    ):
        self._store = message_store
        self._client = client
        self._namespace = namespace
        self._limits = limits or WatchLimits()
        self._clock = clock
        self._sleeper = sleeper

    def run(  # pyright: ignore[reportIncompatibleMethodOverride]  # Dagster's own clients replace **kwargs too
        self,
        *,
        context: StepContext,
        config: C,
        extras: PipesExtras | None = None,
        name_prefix: str | None = None,
        name: str | None = None,
        work: str | None = None,
        on_message: OnMessage | None = None,
        on_log_line: Callable[[LogLine], None] = show_line,
    ) -> dg.PipesClientCompletedInvocation:
        """The finished invocation, with every result and custom message of the job and its name as metadata.

        `work` identifies what the job computes, so that a retry adopts only a job that computes the same; by default a
        digest of config and extras. `name` replaces the generated name. dg.Failure says why a job failed, with the last
        log lines as metadata; it forbids retries where they could not help.
        """
        with as_dagster_failure():
            client = self._client or self.client_class.production()
            kind = client.resource
            run_id, step_key = context.run.run_id, context.get_step_execution_context().step.key
            attempt = {"run_id": run_id, "step_key": step_key, "attempt": context.retry_number}
            content = work or json.dumps([config.model_dump(mode="json"), extras or {}], sort_keys=True, default=str)
            request = JobRequest(
                kind,
                name or type(self).build_name(name_prefix or kind.slug, **attempt),
                namespace=self._namespace or detect_current_namespace(None) or "default",
                step_key=step_key,
                run_id=run_id,
                ancestor_run_ids=_retried_runs(context),
                work=hashlib.sha256(content.encode()).hexdigest(),
            )
            reader = PipesStoreMessageReader(
                self._store, launch_id=request.launch_id, run_id=run_id, logger=context.log, on_message=on_message
            )
            with dg.open_pipes_session(
                context=context,
                extras=extras,
                context_injector=dg.PipesEnvContextInjector(),
                message_reader=reader,
            ) as session:
                manifest = type(self).build_manifest(
                    config,
                    name=request.name,
                    namespace=request.namespace,
                    env=session.get_bootstrap_env_vars(),
                    labels={**_dagster_labels(context), **request.labels},
                    annotations=request.annotations,
                )
                started = self._run_job(context, client, request, manifest, reader, on_log_line)
        job, key = started.found, kind.slug.replace("-", "_")
        metadata = {key: f"{job.namespace}/{job.name}", f"{key}_adopted": started.adopted}
        return dg.PipesClientCompletedInvocation(session, metadata=metadata)

    def _run_job(
        self,
        context: StepContext,
        client: JobClient[Any],
        request: JobRequest,
        manifest: dict[str, Any],
        reader: PipesStoreMessageReader,
        on_log_line: Callable[[LogLine], None],
    ) -> Started[Job]:
        """Start or adopt the job and wait until it has succeeded and its messages are read."""
        timing: dict[str, Any] = {"clock": self._clock, "sleeper": self._sleeper, "logger": context.log}
        launcher = JobLauncher(
            client, shield=interrupts_after, outage_seconds=self._limits.outage_timeout_seconds, **timing
        )

        def remove() -> None:
            launcher.remove(request, grace_seconds=_CANCEL_GRACE_SECONDS, timeout_seconds=_CANCEL_TIMEOUT_SECONDS)

        if is_being_cancelled(context):
            raise cancelled_failure()
        with removing(context, str(request), remove):
            started = launcher.start(request, manifest)
            self._record(context, started)
            reader.attach(started.found.launch_id or request.launch_id)
            watcher = JobWatcher(
                client, started.found, limits=self._limits, on_log_line=on_log_line, on_tick=reader.poll, **timing
            )
            try:
                watcher.wait_until_finished()
            except ResourceFailedError as error:
                with added_to(error, context.log):
                    reader.poll()  # the last messages may explain the failure
                raise
            reader.drain(timeout_seconds=_DRAIN_TIMEOUT_SECONDS, clock=self._clock, sleeper=self._sleeper)
        return started

    def _record(self, context: StepContext, started: Started[Job]) -> None:
        """Write to the event log which job belongs to the step, as Dagster's own re-attaching clients do."""
        job, client_name = started.found, type(self).__name__
        handle = find_latest_launch_handle(context, client_name=client_name)
        if started.adopted and handle and handle.external_run_id == job.name:
            record_external_reattach(context, handle)
            return
        extras = {"namespace": job.namespace, "uid": job.uid, "adopted": started.adopted}
        record_external_launch(context, client_name=client_name, external_run_id=job.name, extras=extras)


def _retried_runs(context: StepContext) -> tuple[str, ...]:
    """Runs that this one retries from failure, nearest first. Any other re-execution starts over."""
    runs: list[str] = []
    run = context.run
    while (
        run.parent_run_id
        and run.parent_run_id not in runs
        and len(runs) < _MAX_ANCESTORS
        and "true" in (run.tags.get(RESUME_RETRY_TAG), run.tags.get(ASSET_RESUME_RETRY_TAG))
    ):
        runs.append(run.parent_run_id)
        parent = context.instance.get_run_by_id(run.parent_run_id)
        if parent is None:
            break
        run = parent
    return tuple(runs)


def _dagster_labels(context: StepContext) -> dict[str, str]:
    """The labels that dagster-k8s gives its own jobs."""
    return {
        **get_common_labels(),
        "dagster/job": sanitize_k8s_label(context.job_name),
        "dagster/op": sanitize_k8s_label(context.get_step_execution_context().step.key),
    }
