"""Runs whose process was killed: real commands in a temporary instance."""

import io
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.launcher import WorkerStatus

from resources import run_liveness
from resources.run_liveness import WatchedRunLauncher, holding_lock, lock_path, settle_dead_runs
from tests.fixtures.workspace import ROOT, wait_until

POOL = "training"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(ROOT / "dagster.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    return tmp_path


@pytest.fixture
def instance(folder: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.from_config(str(folder)) as instance:
        yield instance


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def materialize(processes: list[subprocess.Popen[bytes]], folder: Path) -> tuple[subprocess.Popen[bytes], Path]:
    """`dagster asset materialize` in the background, and the file with its output."""
    output = folder / f"output-{len(processes)}"
    command = ["dagster", "asset", "materialize", "--select", "model", "-m", "tests.fixtures.pool_definitions"]
    with output.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-m", *command], stdout=file, stderr=file)
    processes.append(process)
    return process, output


def kill_while_it_works(processes: list[subprocess.Popen[bytes]], folder: Path, *, with_child: bool = False) -> None:
    (folder / "hold-model").touch()
    if with_child:
        (folder / "with-child").touch()
    process, output = materialize(processes, folder)
    wait_until(lambda: (folder / "log-model").exists() or process.poll() is not None, "the asset to start")
    assert process.poll() is None, output.read_text()
    process.kill()
    process.wait()
    for name in ("hold-model", "with-child"):
        (folder / name).unlink(missing_ok=True)


def num_slots(instance: dg.DagsterInstance) -> tuple[int, int]:
    pool = instance.event_log_storage.get_concurrency_info(POOL)
    return pool.active_slot_count, pool.pending_step_count


def failure_of(instance: dg.DagsterInstance, run_id: str) -> str:
    (event,) = instance.all_logs(run_id, of_type=dg.DagsterEventType.RUN_FAILURE)
    return event.get_dagster_event().message or ""


def test_the_command_after_a_killed_one_fails_its_run_and_takes_its_slot(
    folder: Path, instance: dg.DagsterInstance, processes: list[subprocess.Popen[bytes]]
) -> None:
    kill_while_it_works(processes, folder)
    (killed,) = instance.get_runs()
    assert killed.status == dg.DagsterRunStatus.STARTED
    assert num_slots(instance) == (1, 0)
    process, output = materialize(processes, folder)
    assert process.wait(400) == 0, output.read_text()
    assert f"Run {killed.run_id} was found dead" in output.read_text()
    assert instance.get_run_by_id(killed.run_id).status == dg.DagsterRunStatus.FAILURE  # pyright: ignore
    assert "start the run again to continue" in failure_of(instance, killed.run_id)
    assert num_slots(instance) == (0, 0)
    assert list(lock_path(instance, "").iterdir()) == []


def test_a_command_says_whom_it_waits_for_and_takes_over_when_that_run_is_killed(
    folder: Path, instance: dg.DagsterInstance, processes: list[subprocess.Popen[bytes]]
) -> None:
    """A child of the killed run, such as a trainer writing a checkpoint, holds the slot until it ends."""
    kill_while_it_works(processes, folder, with_child=True)
    (killed,) = instance.get_runs()
    process, output = materialize(processes, folder)
    message = f"held by run {killed.run_id}, which is STARTED"
    wait_until(lambda: message in output.read_text() or process.poll() is not None, "the message")
    assert process.poll() is None, output.read_text()
    assert settle_dead_runs(instance) == []
    os.kill(int((folder / "child").read_text()), signal.SIGKILL)
    assert process.wait(400) == 0, output.read_text()
    assert "killed or crashed" in failure_of(instance, killed.run_id)


def test_a_killed_command_that_was_waiting_blocks_nobody(
    folder: Path, instance: dg.DagsterInstance, processes: list[subprocess.Popen[bytes]]
) -> None:
    kill_while_it_works(processes, folder, with_child=True)
    waiting, output = materialize(processes, folder)
    wait_until(lambda: "Waiting for the pool" in output.read_text() or waiting.poll() is not None, "the message")
    waiting.kill()
    waiting.wait()
    os.kill(int((folder / "child").read_text()), signal.SIGKILL)
    wait_until(lambda: len(settle_dead_runs(instance)) == 2 or num_slots(instance) == (0, 0), "both to be settled")
    assert {run.status for run in instance.get_runs()} == {dg.DagsterRunStatus.FAILURE}
    assert num_slots(instance) == (0, 0)


@dg.job
def anything() -> None: ...


def started_run(instance: dg.DagsterInstance) -> dg.DagsterRun:
    return instance.create_run_for_job(anything, status=dg.DagsterRunStatus.STARTED)


def leave_lock(instance: dg.DagsterInstance, run_id: str) -> None:
    """The state after a process was killed: its file exists, without a lock."""
    lock_path(instance, run_id).parent.mkdir(parents=True, exist_ok=True)
    lock_path(instance, run_id).touch()


@pytest.mark.parametrize("on_another_machine", [True, False])
def test_a_run_of_another_machine_or_program_is_not_judged(
    instance: dg.DagsterInstance, on_another_machine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started_run(instance)
    if on_another_machine:
        with monkeypatch.context() as patch:
            patch.setattr("socket.gethostname", lambda: "another")
            leave_lock(instance, run.run_id)
    assert settle_dead_runs(instance) == []
    assert isinstance(instance.run_launcher, WatchedRunLauncher)
    assert instance.run_launcher.check_run_worker_health(run).status == WorkerStatus.RUNNING


def test_a_running_process_is_healthy_and_a_dead_one_is_not(instance: dg.DagsterInstance) -> None:
    launcher = instance.run_launcher
    run = started_run(instance)
    with holding_lock(instance, run.run_id):
        assert launcher.check_run_worker_health(run).status == WorkerStatus.RUNNING
        assert settle_dead_runs(instance) == []
    leave_lock(instance, run.run_id)
    assert launcher.check_run_worker_health(run).status == WorkerStatus.FAILED


def test_dead_run_that_was_being_canceled_is_canceled(instance: dg.DagsterInstance) -> None:
    run = started_run(instance)
    instance.report_run_canceling(run)
    leave_lock(instance, run.run_id)
    assert settle_dead_runs(instance) == [run.run_id]
    assert instance.get_run_by_id(run.run_id).status == dg.DagsterRunStatus.CANCELED  # pyright: ignore


@pytest.mark.parametrize("deleted", [False, True])
def test_slots_of_a_run_that_ended_or_was_deleted_are_freed(instance: dg.DagsterInstance, deleted: bool) -> None:
    run = started_run(instance)
    instance.event_log_storage.initialize_concurrency_limit_to_default(POOL)
    assert instance.event_log_storage.claim_concurrency_slot(POOL, run.run_id, "model").is_claimed
    if deleted:
        instance.delete_run(run.run_id)
    else:
        instance.report_run_failed(run)
    settle_dead_runs(instance)
    assert num_slots(instance) == (0, 0)


def test_two_commands_at_once_run_one_after_the_other(
    folder: Path, instance: dg.DagsterInstance, processes: list[subprocess.Popen[bytes]]
) -> None:
    (folder / "hold-model").touch()
    both = [materialize(processes, folder) for _ in range(2)]
    wait_until(lambda: any("Waiting for the pool" in output.read_text() for _, output in both), "one to wait")
    wait_until(lambda: (folder / "log-model").exists(), "the other one to work")
    wait_until(lambda: "\n" in (folder / "log-model").read_text(), "its process")
    assert len((folder / "log-model").read_text().split()) == 1
    (folder / "hold-model").unlink()
    for process, output in both:
        assert process.wait(400) == 0, output.read_text()
    assert sorted((folder / "log-model").read_text().split()) == sorted(str(process.pid) for process, _ in both)
    assert num_slots(instance) == (0, 0)


def watched(instance: dg.DagsterInstance, run: dg.DagsterRun) -> str:
    log = io.StringIO()
    logger = logging.Logger("watch")
    logger.addHandler(logging.StreamHandler(log))
    run_liveness._watch_once(instance, run.run_id, logger, set())  # pyright: ignore[reportArgumentType]
    return log.getvalue()


def test_two_runs_that_were_assigned_the_same_slot_say_who_waits(instance: dg.DagsterInstance) -> None:
    holder, waiting = started_run(instance), started_run(instance)
    storage: Any = instance.event_log_storage
    storage.initialize_concurrency_limit_to_default(POOL)
    for run in (holder, waiting):
        storage.add_pending_step(POOL, run.run_id, "model", should_assign=True)
    assert storage.claim_concurrency_slot(POOL, holder.run_id, "model").is_claimed
    assert f"held by run {holder.run_id}" in watched(instance, waiting)
    assert watched(instance, holder) == ""


def test_a_run_that_missed_the_end_of_the_one_before_gets_its_slot(instance: dg.DagsterInstance) -> None:
    run = started_run(instance)
    storage: Any = instance.event_log_storage
    storage.initialize_concurrency_limit_to_default(POOL)
    storage.add_pending_step(POOL, run.run_id, "model", should_assign=False)
    assert not storage.claim_concurrency_slot(POOL, run.run_id, "model").is_claimed
    watched(instance, run)
    assert storage.claim_concurrency_slot(POOL, run.run_id, "model").is_claimed
