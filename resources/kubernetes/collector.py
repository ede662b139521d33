"""A sensor that collects what a Dagster run left behind: jobs that nobody waits for, and messages nobody will read."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg

from resources.errors import StoreError
from resources.kubernetes.errors import KubernetesError
from resources.kubernetes.job import Job, JobClient
from resources.kubernetes.messages import MARKS_FOLDER, MESSAGES_FOLDER
from resources.kubernetes.naming import MANAGED_BY_LABEL, selector
from resources.object_store import ObjectStore

_GRACE_SECONDS = 60.0
"""After the end of a run, for its own process to remove the job."""
_MESSAGE_RETENTION = timedelta(days=7)


@dataclass(frozen=True)
class RunEnd:
    """How and when a Dagster run ended."""

    status: dg.DagsterRunStatus
    ended_at: float
    """Seconds since the epoch."""


@dataclass(frozen=True)
class CollectorTarget:
    """Where a collector looks."""

    client: JobClient[Any]
    namespace: str
    message_store: ObjectStore


def collect_leftovers(
    client: JobClient[Any],
    namespace: str,
    run_end: Callable[[str], RunEnd | None],
    *,
    now: float,
    failure_grace_seconds: float,
    problems: list[Exception],
) -> list[tuple[Job, str]]:
    """Delete the active jobs of ended runs, and return those with the reason. The errors of others join `problems`.

    A failed run's job is left for `failure_grace_seconds`, as a retry of the run may adopt it. `run_end` gives None for
    a run that has not ended, and for one that this instance does not know: it may be another instance's. Finished jobs
    end by their time to live.
    """
    deleted: list[tuple[Job, str]] = []
    for job in _managed(client, namespace):
        end = None if job.finished or job.deleting or job.run_id is None else run_end(job.run_id)
        if end is None:
            continue
        grace = failure_grace_seconds if end.status == dg.DagsterRunStatus.FAILURE else _GRACE_SECONDS
        if now - end.ended_at < grace:
            continue
        try:
            client.delete(job)
            deleted.append((job, f"Dagster run {job.run_id} ended as {end.status.value} and nobody waits for it"))
        except KubernetesError as error:
            problems.append(error)
    return deleted


def collect_messages(store: ObjectStore, live_launch_ids: Iterable[str], *, older_than: datetime) -> int:
    """Delete messages, and marks of what was read, of jobs that no longer exist; the number of deleted objects.

    A job's messages stay while any of them is younger than `older_than`: its run may be retried.
    """
    live = set(live_launch_ids)
    keys: dict[str, list[str]] = {}
    for folder in (MESSAGES_FOLDER, MARKS_FOLDER):
        for info in store.list(f"{folder}/"):
            launch_id = info.key.split("/")[1]
            keys.setdefault(launch_id, []).append(info.key)
            if info.last_modified > older_than:
                live.add(launch_id)
    dead = [key for launch_id, found in keys.items() if launch_id not in live for key in found]
    for key in dead:
        store.delete(key)
    return len(dead)


def build_job_collector(
    kind: type[Job],
    target: Callable[[dg.SensorEvaluationContext], CollectorTarget],
    *,
    required_resource_keys: set[str] | None = None,
    failure_grace_seconds: float = 900.0,
) -> dg.SensorDefinition:
    """A sensor that deletes leftover jobs of the kind, and old messages.

    `target` is called at each evaluation, with the resources of `required_resource_keys`; nothing is connected before.
    """

    @dg.sensor(
        name=f"{kind.slug.replace('-', '_')}_collector",
        minimum_interval_seconds=120,
        default_status=dg.DefaultSensorStatus.RUNNING,
        required_resource_keys=required_resource_keys,
        description=f"Deletes {kind.kind}s whose Dagster run has ended, and Pipes messages that nobody will read.",
    )
    def collector(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        where = target(context)
        problems: list[Exception] = []
        leftovers = collect_leftovers(
            where.client,
            where.namespace,
            lambda run_id: _run_end(context.instance, run_id),
            now=time.time(),
            failure_grace_seconds=failure_grace_seconds,
            problems=problems,
        )
        for job, reason in leftovers:
            context.log.warning(f"Deleted {job}: {reason}.")
        launch_ids = [job.launch_id for job in _managed(where.client, where.namespace) if job.launch_id]
        num_deleted = 0
        try:
            older_than = datetime.now(UTC) - _MESSAGE_RETENTION
            num_deleted = collect_messages(where.message_store, launch_ids, older_than=older_than)
        except StoreError as error:
            problems.append(error)
        names = ", ".join(job.name for job, _ in leftovers) or "none"
        done = f"Leftover {kind.kind}s deleted: {names}. Old message objects deleted: {num_deleted}."
        if problems:
            raise KubernetesError("\n".join([done, *(f"Not deleted: {problem}" for problem in problems)]))
        return dg.SkipReason(done)

    return collector


def _managed(client: JobClient[Any], namespace: str) -> list[Job]:
    return client.find(namespace, selector(**{MANAGED_BY_LABEL: client.resource.managed_by()}))


def _run_end(instance: dg.DagsterInstance, run_id: str) -> RunEnd | None:
    record = instance.get_run_record_by_id(run_id)
    if record is None or not record.dagster_run.is_finished:
        return None
    return RunEnd(record.dagster_run.status, record.end_time or record.update_timestamp.timestamp())
