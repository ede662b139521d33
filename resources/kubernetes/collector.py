"""A sensor that cleans up after Dagster runs: deletes abandoned jobs, and messages that nobody will read."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import dagster as dg

from resources.errors import StoreError
from resources.kubernetes.errors import KubernetesError
from resources.kubernetes.job import Job, JobClient
from resources.kubernetes.naming import MANAGED_BY_LABEL, selector
from resources.object_store import ObjectStore
from resources.pipes_reader import MARKS_FOLDER, MESSAGES_FOLDER

_GRACE_SECONDS = 60.0
"""Time after the end of a run for its own process to remove the job."""
_FINISHED_SECONDS = 24 * 3600.0
"""Time after the end of a run for a person to look at a finished job that the cluster would keep forever."""
_MESSAGE_RETENTION = timedelta(days=7)


@dataclass(frozen=True)
class CollectorTarget:
    """The job client and message store that a collector uses."""

    client: JobClient[Any]
    namespace: str
    message_store: ObjectStore


def build_job_collector(
    name: str,
    target: Callable[[dg.SensorEvaluationContext], CollectorTarget],
    *,
    required_resource_keys: set[str] | None = None,
    failure_grace_seconds: float = 900.0,
) -> dg.SensorDefinition:
    """A sensor that deletes the active jobs of ended runs, their finished jobs that do not expire, and old messages.

    A failed run's job is kept for `failure_grace_seconds`, because a retry of the run may adopt it. `target` is called
    at each evaluation, with the resources of `required_resource_keys`; no connection is opened before.
    """

    @dg.sensor(
        name=name,
        minimum_interval_seconds=120,
        default_status=dg.DefaultSensorStatus.RUNNING,
        required_resource_keys=required_resource_keys,
        description="Deletes jobs whose Dagster run has ended, and Pipes messages that nobody will read.",
    )
    def collector(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        where = target(context)
        problems: list[Exception] = []
        deleted: list[str] = []
        kind = where.client.resource
        jobs: list[Job] = where.client.find(where.namespace, selector(**{MANAGED_BY_LABEL: kind.managed_by()}))
        for job in jobs:
            status = _ended_as(context.instance, job, failure_grace_seconds)
            if status is None:
                continue
            try:
                where.client.delete(job)
            except KubernetesError as error:
                problems.append(error)
                continue
            deleted.append(job.name)
            context.log.warning(
                f"Deleted {job}: run {job.run_id} ended as {status.value} and nothing waits for the job."
            )
        num_deleted = 0
        try:
            older_than = datetime.now(UTC) - _MESSAGE_RETENTION
            num_deleted = collect_messages(where.message_store, {job.launch_id for job in jobs}, older_than=older_than)
        except StoreError as error:
            problems.append(error)
        names = ", ".join(deleted) or "none"
        done = f"Leftover {kind.kind}s deleted: {names}. Old message objects deleted: {num_deleted}."
        if problems:
            raise KubernetesError("\n".join([done, *(f"Not deleted: {problem}" for problem in problems)]))
        return dg.SkipReason(done)

    return collector


def collect_messages(store: ObjectStore, live_launch_ids: Collection[str | None], *, older_than: datetime) -> int:
    """Delete the messages and read marks of jobs that no longer exist, and return the number of deleted objects.

    A job's messages are kept while any of them is younger than `older_than`: its run may be retried.
    """
    live = set(live_launch_ids)
    keys: list[tuple[str, str]] = []
    for folder in (MESSAGES_FOLDER, MARKS_FOLDER):
        for info in store.list(f"{folder}/"):
            launch_id = info.key.split("/")[1]
            keys.append((launch_id, info.key))
            if info.last_modified > older_than:
                live.add(launch_id)
    dead = [key for launch_id, key in keys if launch_id not in live]
    for key in dead:
        store.delete(key)
    return len(dead)


def is_abandoned(status: dg.DagsterRunStatus, seconds_since_end: float, failure_grace_seconds: float) -> bool:
    """Whether nothing waits any longer for the active job of a run that ended this way."""
    grace = failure_grace_seconds if status == dg.DagsterRunStatus.FAILURE else _GRACE_SECONDS
    return seconds_since_end >= grace


def _ended_as(instance: dg.DagsterInstance, job: Job, failure_grace_seconds: float) -> dg.DagsterRunStatus | None:
    """Final status of the run that abandoned the job; None for a run of another Dagster instance."""
    if (job.finished and job.expires) or job.deleting or job.run_id is None:
        return None
    record = instance.get_run_record_by_id(job.run_id)
    if record is None or not record.dagster_run.is_finished:
        return None
    status, ended_at = record.dagster_run.status, record.end_time or record.update_timestamp.timestamp()
    seconds = time.time() - ended_at
    over = seconds >= _FINISHED_SECONDS if job.finished else is_abandoned(status, seconds, failure_grace_seconds)
    return status if over else None
