"""The Dagster Pipes client: one step, one PyTorchJob."""

import hashlib
import json
import time
from collections.abc import Callable
from typing import Any

import dagster as dg
from dagster_k8s.utils import detect_current_namespace, get_common_labels, sanitize_k8s_label
from dagster_pipes import PipesExtras

from resources.dagster_private import (
    ASSET_RESUME_RETRY_TAG,
    RESUME_RETRY_TAG,
    TreatAsResourceParam,
    find_latest_launch_handle,
    record_external_launch,
    record_external_reattach,
)
from resources.kubernetes.diagnosis import WatchLimits
from resources.kubernetes.errors import ResourceFailedError, added_to
from resources.kubernetes.launch import Started
from resources.kubernetes.logs import LogLine, show_line
from resources.kubernetes.steps import (
    StepContext,
    as_dagster_failure,
    cancelled_failure,
    interrupts_after,
    is_being_cancelled,
    removing,
)
from resources.object_store import ObjectStore
from resources.pytorch_job.client import JOB_LABEL, OP_LABEL, PyTorchJob, PyTorchJobClient
from resources.pytorch_job.config import PyTorchJobConfig
from resources.pytorch_job.launch import JobLauncher, JobRequest
from resources.pytorch_job.manifest import build_pytorch_job_manifest, check_job_name, job_name
from resources.pytorch_job.messages import OnMessage, PipesStoreMessageReader
from resources.pytorch_job.watch import JobWatcher

CLIENT_NAME = "PipesPyTorchJobClient"
_MAX_ANCESTORS = 64


class PipesPyTorchJobClient(dg.PipesClient, TreatAsResourceParam):
    """Runs a step's work as a PyTorchJob and waits for it.

    Messages travel through `message_store`, which the pods reach by its URI and the credentials in their environment.
    A cancelled run deletes its job; a run worker that is evicted or killed leaves it, and the step's next attempt
    adopts it. `clock` is monotonic.
    """

    def __init__(
        self,
        *,
        message_store: ObjectStore,
        client: PyTorchJobClient | None = None,
        namespace: str | None = None,
        kubeconfig_file: str | None = None,
        kube_context: str | None = None,
        limits: WatchLimits | None = None,
        cancel_grace_seconds: int = 5,
        cancel_timeout_seconds: float = 25.0,
        drain_timeout_seconds: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
        sleeper: Callable[[float], None] = time.sleep,
    ):
        self._store = message_store
        self._client = client
        self._namespace = namespace
        self._kubeconfig_file = kubeconfig_file
        self._kube_context = kube_context
        self._limits = limits or WatchLimits()
        self._cancel_grace_seconds = cancel_grace_seconds
        self._cancel_timeout_seconds = cancel_timeout_seconds
        self._drain_timeout_seconds = drain_timeout_seconds
        self._clock = clock
        self._sleeper = sleeper

    def run(  # pyright: ignore[reportIncompatibleMethodOverride]  # Dagster's own clients replace **kwargs too
        self,
        *,
        context: StepContext,
        config: PyTorchJobConfig,
        extras: PipesExtras | None = None,
        name_prefix: str = "pytorch-job",
        name: str | None = None,
        namespace: str | None = None,
        work: str | None = None,
        on_message: OnMessage | None = None,
        on_log_line: Callable[[LogLine], None] | None = None,
    ) -> dg.PipesClientCompletedInvocation:
        """The finished invocation, with every result and custom message of the job and its name as metadata.

        `work` identifies what the job computes, so that a retry adopts only a job that computes the same; by default a
        digest of config and extras. `name` replaces the generated name. dg.Failure says why a job failed, with the last
        log lines as metadata; it forbids retries where they could not help.
        """
        client = self._client or PyTorchJobClient.production(
            kubeconfig_file=self._kubeconfig_file, context=self._kube_context
        )
        request = self._request(context, config, extras, name_prefix, name, namespace, work)
        reader = PipesStoreMessageReader(
            self._store,
            launch_id=request.launch_id,
            run_id=context.run.run_id,
            logger=context.log,
            on_message=on_message,
        )
        with (
            as_dagster_failure(),
            dg.open_pipes_session(
                context=context,
                extras=extras,
                context_injector=dg.PipesEnvContextInjector(),
                message_reader=reader,
            ) as session,
        ):
            manifest = build_pytorch_job_manifest(
                config,
                name=request.name,
                namespace=request.namespace,
                env=session.get_bootstrap_env_vars(),
                labels={**_dagster_labels(context), **request.labels},
                annotations=request.annotations,
            )
            launcher = JobLauncher(
                client,
                clock=self._clock,
                sleeper=self._sleeper,
                logger=context.log,
                shield=interrupts_after,
                outage_seconds=self._limits.outage_timeout_seconds,
            )
            if is_being_cancelled(context):
                raise cancelled_failure()

            def remove() -> None:
                launcher.remove(
                    request, grace_seconds=self._cancel_grace_seconds, timeout_seconds=self._cancel_timeout_seconds
                )

            with removing(context, f"PyTorchJob {request.namespace}/{request.name}", remove):
                started = launcher.start(request, manifest)
                self._record(context, started)
                reader.attach(started.found.launch_id or request.launch_id)
                self._watch(context, client, started.found, reader, on_log_line or show_line)
        return dg.PipesClientCompletedInvocation(session, metadata=_metadata(started))

    def _request(
        self,
        context: StepContext,
        config: PyTorchJobConfig,
        extras: PipesExtras | None,
        name_prefix: str,
        name: str | None,
        namespace: str | None,
        work: str | None,
    ) -> JobRequest:
        step_key = context.get_step_execution_context().step.key
        if name is None:
            name = job_name(name_prefix, run_id=context.run.run_id, step_key=step_key, attempt=context.retry_number)
        check_job_name(name, config.replicas)
        return JobRequest(
            name=name,
            namespace=namespace or self._namespace or detect_current_namespace(self._kubeconfig_file) or "default",
            step_key=step_key,
            run_id=context.run.run_id,
            ancestor_run_ids=_retried_runs(context),
            work=hashlib.sha256((work or _content(config, extras)).encode()).hexdigest(),
        )

    def _watch(
        self,
        context: StepContext,
        client: PyTorchJobClient,
        job: PyTorchJob,
        reader: PipesStoreMessageReader,
        on_log_line: Callable[[LogLine], None],
    ) -> None:
        watcher = JobWatcher(
            client,
            job,
            limits=self._limits,
            on_log_line=on_log_line,
            on_tick=reader.poll,
            clock=self._clock,
            sleeper=self._sleeper,
            logger=context.log,
        )
        try:
            watcher.wait_until_finished()
        except ResourceFailedError as error:
            with added_to(error, context.log):
                reader.poll()  # what it said last may explain the failure
            raise
        reader.drain(timeout_seconds=self._drain_timeout_seconds, clock=self._clock, sleeper=self._sleeper)

    def _record(self, context: StepContext, started: Started[PyTorchJob]) -> None:
        """Write to the event log which job belongs to the step, as Dagster's own re-attaching clients do."""
        job = started.found
        handle = find_latest_launch_handle(context, client_name=CLIENT_NAME)
        if started.adopted and handle and handle.external_run_id == job.name:
            record_external_reattach(context, handle)
            return
        record_external_launch(
            context,
            client_name=CLIENT_NAME,
            external_run_id=job.name,
            extras={"namespace": job.namespace, "uid": job.uid, "adopted": started.adopted},
        )


def _content(config: PyTorchJobConfig, extras: PipesExtras | None) -> str:
    return json.dumps([config.model_dump(mode="json"), extras or {}], sort_keys=True, default=str)


def _retried_runs(context: StepContext) -> tuple[str, ...]:
    """Runs that this one retries from failure, nearest first. Any other re-execution starts afresh."""
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
    return {
        **get_common_labels(),
        JOB_LABEL: sanitize_k8s_label(context.job_name),
        OP_LABEL: sanitize_k8s_label(context.get_step_execution_context().step.key),
    }


def _metadata(started: Started[PyTorchJob]) -> dict[str, Any]:
    job = started.found
    return {"pytorch_job": f"{job.namespace}/{job.name}", "pytorch_job_adopted": started.adopted}
