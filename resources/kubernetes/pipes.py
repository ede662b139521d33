"""The Dagster Pipes client for a kind that runs pods to completion: one job per step."""

import json
import time
from abc import ABC
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

import dagster as dg
from dagster_k8s.utils import detect_current_namespace, get_common_labels, sanitize_k8s_label
from dagster_pipes import PipesExtras
from pydantic import BaseModel

from resources.dagster_private import TreatAsResourceParam, record_external_launch
from resources.interrupts import sleep
from resources.kubernetes.diagnosis import WatchLimits
from resources.kubernetes.errors import ResourceFailedError, added_to
from resources.kubernetes.job import Job, JobClient
from resources.kubernetes.logs import LogLine, show_line
from resources.kubernetes.queue import QueueWait
from resources.kubernetes.steps import as_dagster_failure, job_request, owned_job
from resources.kubernetes.watch import JobWatcher
from resources.object_store import ObjectStore
from resources.pipes_reader import OnMessage, PipesStoreMessageReader
from resources.step_context import StepContext

C = TypeVar("C", bound=BaseModel)

_DRAIN_TIMEOUT_SECONDS = 300.0


class PipesJobClient(dg.PipesClient, TreatAsResourceParam, ABC, Generic[C]):
    """Runs a step's work as a job of one kind and waits for it. A kind sets the two class attributes.

    Messages go through `message_store`, which the pods reach by its URI with the credentials in their environment.
    Canceling the run deletes its job; if the run worker is evicted or killed, the job continues and the step's next
    attempt adopts it. `client` and `namespace` default to those of the pod or kubeconfig; `clock` is monotonic.
    """

    client_class: ClassVar[type[JobClient[Any]]]
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
        self._timing: dict[str, Any] = {"clock": clock, "sleeper": sleeper}

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
        """The finished invocation, with all results and custom messages of the job and its name as metadata.

        `work` identifies the job's work, so that a retry adopts only a job that does the same; defaults to config and
        extras. `name` replaces the generated name. Raises dg.Failure with the reason why a job failed and
        the last log lines as metadata; it disallows retries if they cannot help.
        """
        with as_dagster_failure():
            client = self._client or self.client_class.production()
            work = work or json.dumps([config.model_dump(mode="json"), extras or {}], sort_keys=True, default=str)
            namespace = self._namespace or detect_current_namespace(None) or "default"
            prefix = name_prefix or client.resource.slug
            request = job_request(context, client.resource, namespace=namespace, prefix=prefix, work=work, name=name)
            reader = PipesStoreMessageReader(
                self._store,
                launch_id=request.launch_id,
                run_id=request.run_id,
                logger=context.log,
                on_message=on_message,
            )
            injector = dg.PipesEnvContextInjector()
            with dg.open_pipes_session(context, injector, reader, extras=extras) as session:
                manifest = type(self).build_manifest(
                    config,
                    name=request.name,
                    namespace=request.namespace,
                    env=session.get_bootstrap_env_vars(),
                    labels={**_dagster_labels(context), **request.labels},
                    annotations=request.annotations,
                )
                options = {"outage_seconds": self._limits.outage_timeout_seconds, **self._timing}
                with owned_job(context, client, request, manifest, **options) as started:
                    job = started.found
                    record_external_launch(
                        context,
                        client_name=type(self).__name__,
                        external_run_id=job.name,
                        extras={"namespace": job.namespace, "uid": job.uid, "adopted": started.adopted},
                    )
                    reader.attach(job.launch_id or request.launch_id)
                    queued = self._follow(context, client, job, reader, on_log_line)
        key = client.resource.slug.replace("-", "_")
        metadata = {key: f"{job.namespace}/{job.name}", f"{key}_adopted": started.adopted, **queued.metadata(key)}
        return dg.PipesClientCompletedInvocation(session, metadata=metadata)

    def _follow(
        self,
        context: StepContext,
        client: JobClient[Any],
        job: Job,
        reader: PipesStoreMessageReader,
        on_log_line: Callable[[LogLine], None],
    ) -> QueueWait:
        """Wait until the job has succeeded and all its messages are read. Returns its time in a queue."""
        watcher = JobWatcher(
            client,
            job,
            limits=self._limits,
            on_log_line=on_log_line,
            on_tick=reader.poll,
            logger=context.log,
            **self._timing,
        )
        try:
            watcher.wait_until_finished()
        except ResourceFailedError as error:
            with added_to(error, context.log):
                reader.poll()  # the last messages may explain the failure
            raise
        reader.drain(timeout_seconds=_DRAIN_TIMEOUT_SECONDS, **self._timing)
        return watcher.queue_wait


def _dagster_labels(context: StepContext) -> dict[str, str]:
    """The labels that dagster-k8s sets on its jobs."""
    return {
        **get_common_labels(),
        "dagster/job": sanitize_k8s_label(context.job_name),
        "dagster/op": sanitize_k8s_label(context.get_step_execution_context().step.key),
    }
