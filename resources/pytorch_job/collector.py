"""Collecting what a Dagster run left behind: jobs that nobody waits for, and messages that nobody will read."""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import dagster as dg

from resources.errors import StoreError
from resources.kubernetes.errors import KubernetesError
from resources.kubernetes.naming import MANAGED_BY_LABEL, selector
from resources.object_store import ObjectStore
from resources.pytorch_job.client import MANAGED_BY, PyTorchJob, PyTorchJobClient
from resources.pytorch_job.messages import MARKS_FOLDER, MESSAGES_FOLDER

_FINISHED = (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)
_GRACE_SECONDS = 60.0
"""After the end of a run, for its own process to remove the job."""


@dataclass(frozen=True)
class RunEnd:
    """How and when a Dagster run ended."""

    status: dg.DagsterRunStatus
    ended_at: float
    """Seconds since the epoch."""


RunEnds = Callable[[str], RunEnd | None]
"""The end of a run by its id; None for one that has not ended, or that this Dagster instance does not know."""


@dataclass(frozen=True)
class Leftover:
    """An active job whose run has ended."""

    job: PyTorchJob
    reason: str


def find_leftovers(
    jobs: Iterable[PyTorchJob],
    run_end: RunEnds,
    *,
    now: float,
    failure_grace_seconds: float,
) -> list[Leftover]:
    """Active jobs of ended runs.

    A failed run's job is left for `failure_grace_seconds`, as a retry of the run may adopt it. A run that this instance
    does not know may be another instance's: its jobs are left alone. Finished jobs end by their time to live.
    """
    leftovers = []
    for job in jobs:
        if job.status.state.finished or job.deleting or job.run_id is None:
            continue
        end = run_end(job.run_id)
        if end is None:
            continue
        grace = failure_grace_seconds if end.status == dg.DagsterRunStatus.FAILURE else _GRACE_SECONDS
        if now - end.ended_at >= grace:
            leftovers.append(
                Leftover(job, f"Dagster run {job.run_id} ended as {end.status.value} and nobody waits for it")
            )
    return leftovers


def collect_leftovers(
    client: PyTorchJobClient,
    namespace: str,
    run_end: RunEnds,
    *,
    now: float,
    failure_grace_seconds: float,
    problems: list[Exception],
) -> list[Leftover]:
    """Delete the leftovers of a namespace, and return those that were. The others' errors join `problems`."""
    jobs = client.find(namespace, selector(**{MANAGED_BY_LABEL: MANAGED_BY}))
    deleted = []
    for leftover in find_leftovers(jobs, run_end, now=now, failure_grace_seconds=failure_grace_seconds):
        try:
            client.delete(leftover.job)
            deleted.append(leftover)
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


@dataclass(frozen=True)
class CollectorTarget:
    """Where a collector looks."""

    client: PyTorchJobClient
    namespace: str
    message_store: ObjectStore


def build_pytorch_job_collector(
    target: Callable[[dg.SensorEvaluationContext], CollectorTarget],
    *,
    required_resource_keys: set[str] | None = None,
    name: str = "pytorch_job_collector",
    minimum_interval_seconds: int = 120,
    failure_grace_seconds: float = 900.0,
    message_retention: timedelta = timedelta(days=7),
) -> dg.SensorDefinition:
    """A sensor that deletes leftover jobs and old messages.

    `target` is called at each evaluation, with the resources of `required_resource_keys`; nothing is connected before.
    """

    @dg.sensor(
        name=name,
        minimum_interval_seconds=minimum_interval_seconds,
        default_status=dg.DefaultSensorStatus.RUNNING,
        required_resource_keys=required_resource_keys,
        description="Deletes PyTorchJobs whose Dagster run has ended, and Pipes messages that nobody will read.",
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
        for leftover in leftovers:
            context.log.warning(f"Deleted {leftover.job}: {leftover.reason}.")
        jobs = where.client.find(where.namespace, selector(**{MANAGED_BY_LABEL: MANAGED_BY}))
        num_deleted = 0
        try:
            num_deleted = collect_messages(
                where.message_store,
                [job.launch_id for job in jobs if job.launch_id],
                older_than=datetime.now(UTC) - message_retention,
            )
        except StoreError as error:
            problems.append(error)
        names = ", ".join(leftover.job.name for leftover in leftovers) or "none"
        done = f"Leftover PyTorchJobs deleted: {names}. Old message objects deleted: {num_deleted}."
        if problems:
            raise KubernetesError("\n".join([done, *(f"Not deleted: {problem}" for problem in problems)]))
        return dg.SkipReason(done)

    return collector


def _run_end(instance: dg.DagsterInstance, run_id: str) -> RunEnd | None:
    record = instance.get_run_record_by_id(run_id)
    if record is None:
        logging.getLogger(__name__).debug("Run %s is not of this instance", run_id)
        return None
    status = record.dagster_run.status
    if status not in _FINISHED:
        return None
    return RunEnd(status, record.end_time or record.update_timestamp.timestamp())
