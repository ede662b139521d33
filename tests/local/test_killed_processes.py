"""Processes of the local deployment, killed at each stage of a run: each asset is materialized exactly once."""

import os
import shutil
import signal
from pathlib import Path

import dagster as dg
import psutil
import pytest
from dagster_graphql import DagsterGraphQLClient

from tests.fixtures.workspace import ROOT, Workspace, command_of, wait_until

MODULE = "tests.fixtures.pool_definitions"
ASSETS = ["data", "model", "service"]


pytestmark = pytest.mark.timeout(1800)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    shutil.copy(ROOT / "dagster.yaml", tmp_path)
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    return Workspace(tmp_path, {"PYTHONPATH": str(ROOT)})


def start_run(place: Workspace, url: str, hold: str) -> int:
    """Starts the job through the UI's API and waits until it works on an asset. Returns the run worker's process id."""
    (place.folder / f"hold-{hold}").touch()
    DagsterGraphQLClient("127.0.0.1", port_number=int(url.rpartition(":")[2])).submit_job_execution("everything")
    log = place.folder / f"log-{hold}"
    wait_until(lambda: log.exists() and log.read_text().endswith("\n"), f"the run to work on {hold}")
    return int(log.read_text().split()[-1])


def release(place: Workspace, hold: str) -> None:
    (place.folder / f"hold-{hold}").unlink()


def times_made(place: Workspace) -> list[int]:
    return [len((place.folder / f"log-{name}").read_text().split()) for name in ASSETS]


def wait_for_success(instance: dg.DagsterInstance) -> list[dg.DagsterRun]:
    """All runs, newest first, once the given one has succeeded."""

    def newest_succeeded() -> bool:
        return instance.get_runs(limit=1)[0].status == dg.DagsterRunStatus.SUCCESS

    wait_until(newest_succeeded, "a run to succeed")
    return list(instance.get_runs())


def assert_retried_from(place: Workspace, instance: dg.DagsterInstance, stage: str) -> None:
    retry, killed = wait_for_success(instance)
    assert killed.status == dg.DagsterRunStatus.FAILURE
    assert retry.parent_run_id == killed.run_id
    assert times_made(place) == [1 + (name == stage) for name in ASSETS]
    assert instance.event_log_storage.get_concurrency_info("training").active_slot_count == 0


def test_killed_run_worker_is_replaced_at_the_current_step(place: Workspace) -> None:
    with place.dagster_dev(MODULE) as url, place.instance() as instance:
        for stage in ASSETS:
            worker = start_run(place, url, stage)
            os.kill(worker, signal.SIGKILL)
            release(place, stage)
            assert_retried_from(place, instance, stage)
            for run in instance.get_runs():
                instance.delete_run(run.run_id)
            for name in ASSETS:
                (place.folder / f"log-{name}").unlink()


@pytest.mark.parametrize("stage", ASSETS)
def test_next_dagster_dev_completes_the_run_after_everything_was_killed(place: Workspace, stage: str) -> None:
    with place.dagster_dev(MODULE) as url:
        start_run(place, url, stage)
        os.killpg(_dev(url).pid, signal.SIGKILL)
    release(place, stage)
    with place.dagster_dev(MODULE), place.instance() as instance:
        assert_retried_from(place, instance, stage)
        killed = instance.get_runs()[-1]
        (event,) = instance.all_logs(killed.run_id, of_type=dg.DagsterEventType.RUN_FAILURE)
        assert "Its process on this machine was killed or crashed" in (event.get_dagster_event().message or "")


@pytest.mark.parametrize("victim", ["dagster_webserver", "dagster._daemon", "api grpc"])
def test_run_survives_daemon_webserver_and_code_server(place: Workspace, victim: str) -> None:
    with place.dagster_dev(MODULE) as url, place.instance() as instance:
        start_run(place, url, "model")
        victims = [process for process in _dev(url).children(recursive=True) if victim in " ".join(command_of(process))]
        assert victims
        for process in victims:
            process.kill()
        release(place, "model")
        assert len(wait_for_success(instance)) == 1
        assert times_made(place) == [1, 1, 1]


def _dev(url: str) -> psutil.Process:
    port = url.rpartition(":")[2]
    return next(
        process
        for process in psutil.process_iter(["cmdline"])
        if process.info["cmdline"]
        and process.info["cmdline"][1:4] == ["-m", "dagster", "dev"]
        and port in process.info["cmdline"]
    )
