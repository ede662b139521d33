"""Detects that the process of a run on this machine is gone, so that a killed run does not block later ones.

Dagster watches the workers that a launcher started. `dagster asset materialize` starts none, and a code server that is
killed together with its runs reports nothing. Here each run holds a lock on its own file while its steps execute, and
its trainer inherits the lock. The kernel releases it when the last of these processes has ended, for whatever reason,
and no other process can be mistaken for them. A run of another machine, or one that never held a lock, is ignored.
"""

import fcntl
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import dagster as dg

from resources.dagster_private import (
    CheckRunHealthResult,
    DefaultRunLauncher,
    InProcessExecutor,
    RetryMode,
    WorkerStatus,
)

POLL_SECONDS = 5.0
"""Polling interval of a waiting run."""

_DEAD = "Its process on this machine was killed or crashed. Its pool slots are free; start the run again to continue."
_JUDGED = [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]
_held: set[int] = set()


def inherited_locks() -> tuple[int, ...]:
    """File descriptors for `subprocess.Popen(pass_fds=...)`: the run counts as alive while the child lives."""
    return tuple(_held)


@contextmanager
def holding_lock(instance: dg.DagsterInstance, run_id: str) -> Iterator[None]:
    """Mark the run as alive in this process."""
    path = lock_path(instance, run_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    with unfinished.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        unfinished.rename(path)  # locked before anyone can see it
        _held.add(file.fileno())
        try:
            yield
        finally:
            _held.discard(file.fileno())
            path.unlink(missing_ok=True)


def lock_path(instance: dg.DagsterInstance, run_id: str) -> Path:
    """The file that the run locks while it lives, in the folder of its machine."""
    return Path(instance.storage_directory(), "workers", socket.gethostname(), run_id)


def settle_dead_runs(instance: dg.DagsterInstance) -> list[str]:
    """Fail the unfinished runs that are dead, and free the pool slots of ended runs. Returns the ids of dead runs."""
    settled = []
    for found in instance.get_runs(dg.RunsFilter(statuses=_JUDGED)):
        with _is_alive(instance, found.run_id) as alive:
            run = instance.get_run_by_id(found.run_id)
            if alive is False and run and not run.is_finished:
                canceling = run.status == dg.DagsterRunStatus.CANCELING
                report = instance.report_run_canceled if canceling else instance.report_run_failed
                report(run, _DEAD)
                lock_path(instance, run.run_id).unlink(missing_ok=True)
                settled.append(run.run_id)
    for run_id in instance.event_log_storage.get_concurrency_run_ids():
        run = instance.get_run_by_id(run_id)
        with _is_alive(instance, run_id) as alive:
            if not alive and (run is None or run.is_finished):
                instance.event_log_storage.free_concurrency_slots_for_run(run_id)
    return settled


@contextmanager
def _is_alive(instance: dg.DagsterInstance, run_id: str) -> Iterator[bool | None]:
    """Whether a process of the run lives; None if the run has no lock file.

    Of several processes that check a dead run at the same time, only one gets False.
    """
    path, alive = lock_path(instance, run_id), None
    with ExitStack() as stack:
        try:
            fcntl.flock(stack.enter_context(path.open("r+")), fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists():  # or the run just ended
                alive = False
        except FileNotFoundError:
            pass
        except BlockingIOError:
            alive = True
        yield alive


class WatchedRunLauncher(DefaultRunLauncher):
    """Dagster's launcher for one machine, with health checks of run workers: run monitoring fails dead runs."""

    @property
    def supports_check_run_worker_health(self) -> bool:
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        with _is_alive(self._instance, run.run_id) as alive:
            if alive is not False:
                return CheckRunHealthResult(WorkerStatus.RUNNING)
            self._instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
            return CheckRunHealthResult(WorkerStatus.FAILED, _DEAD)


class _WatchedExecutor(InProcessExecutor):
    def execute(self, plan_context: Any, execution_plan: Any) -> Iterator[Any]:
        instance, run_id, log = plan_context.instance, plan_context.dagster_run.run_id, plan_context.log
        if not isinstance(instance.run_launcher, WatchedRunLauncher):
            yield from super().execute(plan_context, execution_plan)
            return
        stop = threading.Event()
        watcher = threading.Thread(target=_watch, args=(instance, run_id, log, stop), daemon=True)
        with holding_lock(instance, run_id):
            for dead in settle_dead_runs(instance):
                log.warning(f"Run {dead} was found dead and has been failed. {_DEAD}")
            watcher.start()
            try:
                yield from super().execute(plan_context, execution_plan)
            finally:
                stop.set()
                watcher.join()


@dg.executor(name="in_process", config_schema=dg.in_process_executor.config_schema)  # pyright: ignore[reportArgumentType]
def watched_executor(context: dg.InitExecutorContext) -> dg.Executor:
    """Dagster's in-process executor with liveness detection, which also logs what a run waits for."""
    return _WatchedExecutor(RetryMode.from_config(context.executor_config["retries"]))  # pyright: ignore[reportArgumentType]


def _watch(instance: dg.DagsterInstance, run_id: str, log: dg.DagsterLogManager, stop: threading.Event) -> None:
    """Log what the run waits for, once for each holder of its pool, and fail a holder that dies meanwhile."""
    told: set[str] = set()
    while not stop.wait(POLL_SECONDS):
        try:
            _watch_once(instance, run_id, log, told)
        except Exception as error:  # this thread must outlive a locked database
            log.debug(f"The pools cannot be read for now: {error}")


def _watch_once(instance: dg.DagsterInstance, run_id: str, log: dg.DagsterLogManager, told: set[str]) -> None:
    storage = instance.event_log_storage
    for pool in [storage.get_concurrency_info(key) for key in storage.get_concurrency_keys()]:
        # Two runs that request a slot at the same moment are both assigned one, although only one can claim it.
        if run_id not in (pool.pending_run_ids | pool.assigned_run_ids) - pool.active_run_ids:
            continue
        settle_dead_runs(instance)
        holders = pool.active_run_ids or pool.assigned_run_ids - {run_id}
        if not holders and run_id in pool.pending_run_ids:  # a slot was freed between this run's check and its entry
            storage.assign_pending_steps([pool.concurrency_key])  # pyright: ignore[reportAttributeAccessIssue]: of SQL
        for holder in holders - told:
            told.add(holder)
            run = instance.get_run_by_id(holder)
            state = f"{run.status.value} ({run.job_name})" if run else "no longer in Dagster"
            log.warning(
                f"Waiting for the pool {pool.concurrency_key!r}, held by run {holder}, which is {state}. To stop "
                "waiting, terminate that run; if it died on another machine, use 'Force termination immediately' in "
                "the UI."
            )
