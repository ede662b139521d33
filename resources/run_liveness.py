"""Notices that the process of a run on this machine is gone, so that a killed run blocks nothing after it.

Dagster watches the workers that a launcher started. `dagster asset materialize` starts none, and a code server that is
killed together with its runs reports nothing. Here each run holds a lock on a file of its own while its steps execute,
and its trainer inherits the lock. The kernel releases it when the last of them has ended, however it ends, and no
other process can be mistaken for them. A run of another machine, or one that never held a lock, is never judged.
"""

import fcntl
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import dagster as dg

from resources.dagster_private import CheckRunHealthResult, DefaultRunLauncher, RetryMode, WorkerStatus

POLL_SECONDS = 5.0
"""Pause between two looks at what a waiting run waits for."""

_RECORD_VERSION = 1
_REPORTED = (
    "Its process on this machine was killed or crashed. Its pool slots are free; start the run again to continue."
)
_JUDGED = [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]
_held: set[int] = set()


def inherited_locks() -> tuple[int, ...]:
    """File descriptors for `subprocess.Popen(pass_fds=...)`: while the child lives, so does its run."""
    return tuple(_held)


@contextmanager
def holding_lock(instance: dg.DagsterInstance, run_id: str) -> Iterator[None]:
    """Mark the run as alive in this process."""
    path = _path(instance, run_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    with unfinished.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        json.dump({"version": _RECORD_VERSION, "host": socket.gethostname(), "pid": os.getpid()}, file)
        file.flush()
        unfinished.rename(path)  # locked before anyone can see it
        _held.add(file.fileno())
        try:
            yield
        finally:
            _held.discard(file.fileno())
            path.unlink(missing_ok=True)


def settle_dead_runs(instance: dg.DagsterInstance) -> list[str]:
    """Fail the unfinished runs that are dead, and free the pool slots of runs that ended. Returns ids of the former."""
    settled = []
    for run in instance.get_runs(dg.RunsFilter(statuses=_JUDGED)):
        with _released_lock(_path(instance, run.run_id)) as record:
            if record is not None and _settle(instance, run.run_id, record):
                settled.append(run.run_id)
    for run_id in instance.event_log_storage.get_concurrency_run_ids():
        run = instance.get_run_by_id(run_id)
        if (run is None or run.is_finished) and not _is_alive(_path(instance, run_id)):
            instance.event_log_storage.free_concurrency_slots_for_run(run_id)
    return settled


def _settle(instance: dg.DagsterInstance, run_id: str, record: dict[str, Any]) -> bool:
    instance.event_log_storage.free_concurrency_slots_for_run(run_id)
    run = instance.get_run_by_id(run_id)
    unfinished = run is not None and not run.is_finished
    if run is not None and unfinished:
        canceling = run.status == dg.DagsterRunStatus.CANCELING
        report = instance.report_run_canceled if canceling else instance.report_run_failed
        report(run, f"{_REPORTED} It was process {record['pid']}.")
    _path(instance, run_id).unlink(missing_ok=True)
    return unfinished


def _path(instance: dg.DagsterInstance, run_id: str) -> Path:
    return Path(instance.storage_directory(), "workers", run_id)


@contextmanager
def _released_lock(path: Path) -> Iterator[dict[str, Any] | None]:
    """The record of a run whose processes are gone, locked against others that judge it; None for any other."""
    try:
        file = path.open("r+")
    except FileNotFoundError:
        yield None
        return
    with file:
        record = _read(file)
        if record is None or record["host"] != socket.gethostname() or not _lock(file):
            yield None
        else:
            yield record


def _is_alive(path: Path) -> bool:
    try:
        with path.open("r+") as file:
            return not _lock(file)
    except FileNotFoundError:
        return False


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(file: IO[str]) -> dict[str, Any] | None:
    try:
        record = json.load(file)
    except ValueError:
        return None
    return record if isinstance(record, dict) and record.get("version") == _RECORD_VERSION else None


class WatchedRunLauncher(DefaultRunLauncher):
    """Dagster's launcher for one machine, with the health of run workers: run monitoring fails those that are dead."""

    @property
    def supports_check_run_worker_health(self) -> bool:
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        with _released_lock(_path(self._instance, run.run_id)) as record:
            if record is None:
                return CheckRunHealthResult(WorkerStatus.RUNNING)
            self._instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
        return CheckRunHealthResult(WorkerStatus.FAILED, f"{_REPORTED} It was process {record['pid']}.")


class _WatchedExecutor(dg.Executor):
    def __init__(self, inner: dg.Executor):
        self._inner = inner

    @property
    def retries(self) -> RetryMode:
        return self._inner.retries

    @property
    def step_dependency_config(self) -> Any:
        return self._inner.step_dependency_config

    def execute(self, plan_context: Any, execution_plan: Any) -> Iterator[Any]:
        instance, run = plan_context.instance, plan_context.dagster_run
        if not isinstance(instance.run_launcher, WatchedRunLauncher):
            yield from self._inner.execute(plan_context, execution_plan)
            return
        stop = threading.Event()
        watcher = threading.Thread(target=_watch, args=(instance, run.run_id, plan_context.log, stop), daemon=True)
        with holding_lock(instance, run.run_id):
            for dead in settle_dead_runs(instance):
                plan_context.log.warning(f"Run {dead} was found dead and has been failed. {_REPORTED}")
            watcher.start()
            try:
                yield from self._inner.execute(plan_context, execution_plan)
            finally:
                stop.set()
                watcher.join()


def watched(executor: dg.ExecutorDefinition) -> dg.ExecutorDefinition:
    """The same executor, whose runs are known to be alive and say whom they wait for."""
    create = executor.executor_creation_fn
    assert create is not None

    def create_watched(context: dg.InitExecutorContext) -> dg.Executor:
        return _WatchedExecutor(create(context))

    return dg.ExecutorDefinition(
        executor.name,
        executor.config_schema,  # pyright: ignore[reportArgumentType]: as its own copy_for_configured does
        executor.get_requirements,
        create_watched,
        executor.description,
    )


def _watch(instance: dg.DagsterInstance, run_id: str, log: dg.DagsterLogManager, stop: threading.Event) -> None:
    """Say whom the run waits for, once for each holder of its pool, and settle a holder that dies meanwhile."""
    told: set[str] = set()
    while not stop.wait(POLL_SECONDS):
        for pool, holder in _holders_waited_for(instance, run_id):
            settle_dead_runs(instance)
            if holder not in told:
                told.add(holder)
                log.warning(_waits(instance, pool, holder))


def _holders_waited_for(instance: dg.DagsterInstance, run_id: str) -> list[tuple[str, str]]:
    storage = instance.event_log_storage
    pools = [storage.get_concurrency_info(pool) for pool in sorted(storage.get_concurrency_keys())]
    return [
        (pool.concurrency_key, holder)
        for pool in pools
        if run_id in pool.pending_run_ids
        for holder in sorted((pool.active_run_ids | pool.assigned_run_ids) - {run_id})
    ]


def _waits(instance: dg.DagsterInstance, pool: str, holder: str) -> str:
    run = instance.get_run_by_id(holder)
    state = f"{run.status.value} ({run.job_name})" if run else "no longer in Dagster"
    return (
        f"Waiting for the pool {pool!r}, held by run {holder}, which is {state}. To stop waiting, end that run; if it "
        "died on another machine, terminate it in the UI with 'Force termination immediately'."
    )
