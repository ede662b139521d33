"""Metrics of a real Dagster instance, read as Prometheus does."""

import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteInstigatorOrigin, RemoteRepositoryOrigin
from dagster._core.scheduler.instigation import (
    InstigatorState,
    InstigatorStatus,
    InstigatorType,
    SensorInstigatorData,
    TickData,
)
from dagster._daemon.types import DaemonHeartbeat
from dagster_shared.error import SerializableErrorInfo
from prometheus_client import CollectorRegistry, generate_latest, start_http_server

from cifar_assets.assets.record import DATA_VERSION_TAG
from cifar_assets.exporter import DagsterCollector
from resources.dagster_private import TickStatus
from resources.trainer.kubernetes import build_trainer_collector
from tests.fixtures.cifar10 import INFERENCE_SERVICE, TRAINED_MODEL


class Broken(dg.Config):
    broken: bool = False


@dg.op
def work(config: Broken) -> None:
    if config.broken:
        raise RuntimeError("broken")


@dg.job
def daily() -> None:
    work()


@dg.job
def never_run() -> None:
    work()


@dg.asset_check(asset="model")
def good() -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=True)


@dg.asset_check(asset="model")
def judged_by_hand() -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=True)


@dg.sensor(job=daily)
def watching() -> None: ...


@dg.schedule(job=daily, cron_schedule="@daily")
def morning() -> None: ...


DEFS = dg.Definitions(
    assets=[dg.AssetSpec("model"), dg.AssetSpec(INFERENCE_SERVICE), dg.AssetSpec(TRAINED_MODEL)],
    jobs=[daily, never_run],
    asset_checks=[good, judged_by_hand],
    sensors=[watching],
    schedules=[morning],
)


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:  # an ephemeral one stores no ticks
        yield instance


def read(instance: dg.DagsterInstance) -> dict[str, float]:
    """The samples by name and labels, as in the text that Prometheus gets."""
    registry = CollectorRegistry()
    registry.register(DagsterCollector(instance, DEFS.get_repository_def()))
    lines = generate_latest(registry).decode().splitlines()
    samples = [line.rpartition(" ") for line in lines if not line.startswith("#")]
    assert len({name for name, _, _ in samples}) == len(samples), "Prometheus refuses duplicates"
    return {name: float(value) for name, _, value in samples}


def run(instance: dg.DagsterInstance, *, broken: bool) -> None:
    config = {"ops": {"work": {"config": {"broken": broken}}}}
    DEFS.resolve_job_def("daily").execute_in_process(config, instance=instance, raise_on_error=False)


def ticked(
    instance: dg.DagsterInstance,
    name: str,
    *statuses: TickStatus,
    location: str = "cifar",
    status: InstigatorStatus = InstigatorStatus.RUNNING,
    at: float = 1000.0,
) -> None:
    """Record ticks as the daemon does."""
    repository = RemoteRepositoryOrigin(RegisteredCodeLocationOrigin(location), "__repository__")
    state = InstigatorState(
        RemoteInstigatorOrigin(repository, name), InstigatorType.SENSOR, status, SensorInstigatorData()
    )
    instance.add_instigator_state(state)
    for number, each in enumerate(statuses):
        instance.create_tick(
            TickData(
                state.instigator_origin_id,
                name,
                InstigatorType.SENSOR,
                each,
                timestamp=at + number,
                selector_id=state.selector_id,
                run_ids=[] if each == TickStatus.SUCCESS else None,
                error=SerializableErrorInfo("broken", [], None) if each == TickStatus.FAILURE else None,
            )
        )


def test_an_empty_instance_has_no_samples(instance: dg.DagsterInstance) -> None:
    assert read(instance) == {}


def test_last_ended_run_of_each_job_counts(instance: dg.DagsterInstance) -> None:
    before = time.time()
    run(instance, broken=True)
    instance.create_run_for_job(daily, status=dg.DagsterRunStatus.STARTED)
    samples = read(instance)
    assert samples['dagster_last_run_failed{job_name="daily"}'] == 1
    assert before <= samples['dagster_last_run_end_timestamp_seconds{job_name="daily"}'] <= time.time()
    assert not [name for name in samples if "never_run" in name]
    run(instance, broken=False)
    assert read(instance)['dagster_last_run_failed{job_name="daily"}'] == 0


def test_a_canceled_run_did_not_fail(instance: dg.DagsterInstance) -> None:
    instance.report_run_canceled(instance.create_run_for_job(daily))
    assert read(instance)['dagster_last_run_failed{job_name="daily"}'] == 0


def test_last_ended_tick_of_what_is_on_counts(instance: dg.DagsterInstance) -> None:
    ticked(instance, "watching", TickStatus.SKIPPED, TickStatus.FAILURE, TickStatus.STARTED)
    ticked(instance, "morning", TickStatus.FAILURE, TickStatus.SUCCESS)
    ticked(instance, "removed_from_the_code", TickStatus.FAILURE)
    ticked(instance, build_trainer_collector().name, TickStatus.FAILURE)  # only a cluster defines it
    assert read(instance) == {
        'dagster_last_tick_failed{name="watching"}': 1,
        'dagster_last_tick_failed{name="morning"}': 0,
        'dagster_last_tick_failed{name="trainer_collector"}': 1,
    }


def test_a_sensor_that_was_turned_off_has_no_sample(instance: dg.DagsterInstance) -> None:
    ticked(instance, "watching", TickStatus.FAILURE, status=InstigatorStatus.STOPPED)
    assert read(instance) == {}


def test_a_sensor_of_two_code_locations_has_the_newer_tick(instance: dg.DagsterInstance) -> None:
    ticked(instance, "watching", TickStatus.SKIPPED, location="renamed", at=2000.0)
    ticked(instance, "watching", TickStatus.FAILURE, location="cifar")
    assert read(instance) == {'dagster_last_tick_failed{name="watching"}': 0}


def test_last_evaluation_of_each_check_counts(instance: dg.DagsterInstance) -> None:
    before = time.time()
    for check, passed in (("judged_by_hand", True), ("judged_by_hand", False), ("good", False), ("good", True)):
        instance.report_runless_asset_event(
            dg.AssetCheckEvaluation(asset_key=dg.AssetKey("model"), check_name=check, passed=passed)
        )
    samples = read(instance)
    assert samples['dagster_check_passed{asset="model",check="judged_by_hand"}'] == 0
    assert samples['dagster_check_passed{asset="model",check="good"}'] == 1
    assert samples['dagster_check_timestamp_seconds{asset="model",check="good"}'] >= before - 1


def test_heartbeats_of_the_daemon(instance: dg.DagsterInstance) -> None:
    instance.add_daemon_heartbeat(DaemonHeartbeat(1234.5, "SENSOR", "some-id"))
    assert read(instance) == {'dagster_daemon_heartbeat_timestamp_seconds{daemon="SENSOR"}': 1234.5}


def test_the_deployed_model_is_as_old_as_its_first_materialization(instance: dg.DagsterInstance) -> None:
    def report(key: dg.AssetKey, digest: str) -> float:
        instance.report_runless_asset_event(dg.AssetMaterialization(key, tags={DATA_VERSION_TAG: digest}))
        event = instance.get_latest_materialization_event(key)
        assert event
        return event.timestamp

    trained = report(TRAINED_MODEL, "a")
    report(TRAINED_MODEL, "b")
    report(TRAINED_MODEL, "a")
    report(INFERENCE_SERVICE, "b")
    report(INFERENCE_SERVICE, "a")
    samples = read(instance)
    assert samples['cifar10_deployed_model_info{data_set="cifar10",digest="a"}'] == 1
    assert samples['cifar10_deployed_model_trained_timestamp_seconds{data_set="cifar10",digest="a"}'] == pytest.approx(
        trained, abs=1e-3
    )
    assert len(samples) == 2


def test_a_service_reported_without_a_version_has_no_model(instance: dg.DagsterInstance) -> None:
    instance.report_runless_asset_event(dg.AssetMaterialization(INFERENCE_SERVICE))
    assert read(instance) == {}


def test_a_scrape_fails_if_the_storage_does(instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    def down(*_: object, **__: object) -> None:
        raise ConnectionError("the database does not respond")

    monkeypatch.setattr(instance, "get_run_records", down)
    registry = CollectorRegistry()
    registry.register(DagsterCollector(instance, DEFS.get_repository_def()))
    server, thread = start_http_server(0, "127.0.0.1", registry)
    try:
        with pytest.raises(urllib.error.HTTPError, match="500"):
            urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=60)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
