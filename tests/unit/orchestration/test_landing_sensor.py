"""Ticks of the landing sensor with a real store and a real Dagster instance."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.assets.graph.asset_graph_subset import AssetGraphSubset
from dagster._core.execution.asset_backfill import AssetBackfillData
from dagster._core.execution.backfill import BulkActionStatus, PartitionBackfill
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin

from cifar_assets.dataset.landing.zone import RECORD_KEY, LandingRecord, fingerprint, scan_landing
from cifar_assets.definitions import defs
from cifar_assets.landing_decision import LandingCursor, Outcome
from cifar_assets.sensors import last_run, training_in_flight
from resources.object_store import FolderStore
from resources.object_store.resource import LocalObjectStore
from tests.fixtures.cifar10 import DATA_SET, landing_sensor

JOBS = defs.get_repository_def()


def origin(job: str) -> RemoteJobOrigin:
    """Where the daemon finds a run's job."""
    return RemoteJobOrigin(RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("elsewhere"), "__repository__"), job)


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def store(tmp_path: Path) -> LocalObjectStore:
    return LocalObjectStore(path=str(tmp_path))


def land(store: LocalObjectStore, name: str, content: bytes = b"PAR1") -> None:
    store.raw.write(f"landing/{name}", content)
    long_ago = time.time() - 3600
    path = store.raw.local_path(f"landing/{name}")
    assert path is not None
    os.utime(path, (long_ago, long_ago))


def build(store: LocalObjectStore, prefix: str = "") -> None:
    """A build of the raw dataset that reads the landed objects, or those with this prefix."""
    infos = [info for info in scan_landing(store.raw).ready if info.key.startswith(prefix)]
    LandingRecord(read=frozenset(fingerprint(info) for info in infos)).save(store.raw)


def tick(instance: dg.DagsterInstance, store: LocalObjectStore, cursor: str | None = None) -> dg.SensorResult:
    result = landing_sensor(
        dg.build_sensor_context(instance=instance, cursor=cursor, resources={"object_store": store})
    )
    assert isinstance(result, dg.SensorResult)
    return result


def key_of(result: dg.SensorResult) -> str | None:
    return result.run_requests[0].run_key if result.run_requests else None


def reason_of(result: dg.SensorResult) -> str:
    assert result.skip_reason is not None
    text = result.skip_reason.skip_message if isinstance(result.skip_reason, dg.SkipReason) else result.skip_reason
    assert text is not None
    return text


def run_for(instance: dg.DagsterInstance, result: dg.SensorResult, status: dg.DagsterRunStatus) -> dg.DagsterRun:
    """The run that the daemon starts for a request."""
    tags = {"dagster/run_key": key_of(result) or ""}
    return instance.create_run_for_job(JOBS.get_job("retrain"), tags=tags, status=status)


def create(
    instance: dg.DagsterInstance,
    job: str,
    assets: set[str] | None = None,
    status: dg.DagsterRunStatus = dg.DagsterRunStatus.STARTED,
) -> dg.DagsterRun:
    """A run as the UI or a command creates it."""
    definition = JOBS.get_job(job)
    selection = {dg.AssetKey(["cifar10", asset]) for asset in assets} if assets else None
    if selection:
        definition = definition.get_subset(asset_selection=selection)
    return instance.create_run_for_job(
        definition,
        asset_selection=selection and frozenset(selection),
        status=status,
        remote_job_origin=origin(job),
    )


@pytest.mark.parametrize(
    ("job", "assets", "trains"),
    [
        ("retrain", None, True),
        ("train", None, True),
        ("argo_parity", None, True),
        ("deploy", None, False),
        ("rollback", None, False),
        ("__ASSET_JOB", None, True),
        ("__ASSET_JOB", {"trained_model"}, True),
        ("__ASSET_JOB", {"processed_dataset", "trained_model", "inference_service"}, True),
        ("__ASSET_JOB", {"argo_trained_model"}, True),
        ("__ASSET_JOB", {"raw_dataset", "processed_dataset"}, False),
        ("train", {"processed_dataset"}, False),
    ],
)
def test_a_run_is_waited_for_by_what_it_will_materialize(
    instance: dg.DagsterInstance, store: LocalObjectStore, job: str, assets: set[str] | None, trains: bool
) -> None:
    land(store, "a.parquet")
    run = create(instance, job, assets)
    result = tick(instance, store)
    assert (key_of(result) is None) is trains
    if trains:
        assert f"Waiting for run {run.run_id} ({job}, STARTED) to end: 1 new object" in reason_of(result)


@pytest.mark.parametrize("status", [status for status in dg.DagsterRunStatus if status.value != "MANAGED"])
def test_a_run_is_waited_for_until_it_has_ended(instance: dg.DagsterInstance, status: dg.DagsterRunStatus) -> None:
    create(instance, "train", status=status)
    ended = status in (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)
    assert (training_in_flight(instance, DATA_SET) is None) is ended


def test_a_run_of_another_code_location_is_waited_for(instance: dg.DagsterInstance) -> None:
    @dg.asset(key=["cifar10", "trained_model"])
    def model() -> None: ...

    job = dg.Definitions(assets=[model], jobs=[dg.define_asset_job("nightly", "*")]).resolve_job_def("nightly")
    instance.create_run_for_job(job, status=dg.DagsterRunStatus.QUEUED, remote_job_origin=origin("nightly"))
    assert "nightly, QUEUED" in (training_in_flight(instance, DATA_SET) or "")


def test_a_backfill_that_has_started_no_run_yet_is_waited_for(instance: dg.DagsterInstance) -> None:
    key = dg.AssetKey(["cifar10", "trained_model"])
    backfill = PartitionBackfill(
        backfill_id="fill",
        status=BulkActionStatus.REQUESTED,
        from_failure=False,
        tags={},
        backfill_timestamp=time.time(),
        asset_selection=[key],
        asset_backfill_data=AssetBackfillData.empty(
            AssetGraphSubset(non_partitioned_asset_keys={key}), time.time(), instance
        ),
    )
    instance.add_backfill(backfill)
    assert training_in_flight(instance, DATA_SET) == "backfill fill"
    instance.update_backfill(backfill.with_status(BulkActionStatus.COMPLETED_SUCCESS))
    assert training_in_flight(instance, DATA_SET) is None


def test_an_object_that_was_away_while_the_run_read_is_trained_on(
    instance: dg.DagsterInstance, store: LocalObjectStore
) -> None:
    land(store, "a.parquet")
    land(store, "b.parquet")
    first = tick(instance, store)
    run = run_for(instance, first, dg.DagsterRunStatus.SUCCESS)
    build(store, "landing/a.parquet")
    second = tick(instance, store, first.cursor)
    assert key_of(second) not in (None, key_of(first))
    build(store)
    run_for(instance, second, dg.DagsterRunStatus.SUCCESS)
    third = tick(instance, store, second.cursor)
    assert key_of(third) is None
    assert run.run_id not in reason_of(third)


def test_a_reset_cursor_gives_a_run_of_its_own(instance: dg.DagsterInstance, store: LocalObjectStore) -> None:
    land(store, "a.parquet")
    first = tick(instance, store)
    run_for(instance, first, dg.DagsterRunStatus.FAILURE)
    again = tick(instance, store, None)
    assert key_of(again) not in (None, key_of(first))
    assert again.cursor is not None
    assert LandingCursor.load(again.cursor)[0].run_key == key_of(again)
    run_for(instance, again, dg.DagsterRunStatus.FAILURE)
    assert key_of(tick(instance, store, None)) not in (None, key_of(first), key_of(again))


def test_a_replayed_tick_starts_no_second_run_and_says_why(
    instance: dg.DagsterInstance, store: LocalObjectStore
) -> None:
    land(store, "a.parquet")
    first = tick(instance, store)
    run_for(instance, first, dg.DagsterRunStatus.SUCCESS)
    land(store, "b.parquet")
    second = tick(instance, store, first.cursor)
    run = run_for(instance, second, dg.DagsterRunStatus.SUCCESS)
    replayed = tick(instance, store, first.cursor)
    assert key_of(replayed) is None
    assert f"Run {run.run_id} was already started for these objects" in reason_of(replayed)
    assert replayed.cursor == second.cursor


@pytest.mark.parametrize("by_the_daemon", [True, False])
def test_an_automatic_retry_is_waited_for(
    instance: dg.DagsterInstance, store: LocalObjectStore, by_the_daemon: bool
) -> None:
    """Dagster does not retry a run that a command started."""
    land(store, "a.parquet")
    first = tick(instance, store)
    run = instance.create_run_for_job(
        JOBS.get_job("retrain"),
        tags={"dagster/run_key": key_of(first) or "", "dagster/will_retry": "true"},
        status=dg.DagsterRunStatus.FAILURE,
        remote_job_origin=origin("retrain") if by_the_daemon else None,
    )
    second = tick(instance, store, first.cursor)
    if by_the_daemon:
        assert f"Waiting for the automatic retry of run {run.run_id} to end" in reason_of(second)
    else:
        assert key_of(second)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [("a blocking check", "refused"), ("a crash", "crashed"), ("a check that blocks nothing", "succeeded")],
)
def test_verdict_is_distinguished_from_a_crash(instance: dg.DagsterInstance, fault: str, expected: Outcome) -> None:
    @dg.asset(check_specs=[dg.AssetCheckSpec("verdict", asset="model", blocking=fault == "a blocking check")])
    def model() -> dg.MaterializeResult:
        if fault == "a crash":
            raise RuntimeError("out of memory")
        return dg.MaterializeResult(check_results=[dg.AssetCheckResult(passed=False)])

    dg.materialize([model], instance=instance, raise_on_error=False, tags={"dagster/run_key": "landing-1"})
    found = last_run(instance, "landing-1")
    assert found is not None
    assert found.outcome == expected
    assert last_run(instance, "landing-2") is None


def test_a_crash_whose_retry_succeeded_is_over(instance: dg.DagsterInstance) -> None:
    crashes = [True, False]

    @dg.asset
    def model() -> None:
        if crashes.pop(0):
            raise RuntimeError("out of memory")

    for expected in ("crashed", "succeeded"):
        dg.materialize([model], instance=instance, raise_on_error=False, tags={"dagster/run_key": "landing-1"})
        found = last_run(instance, "landing-1")
        assert found is not None
        assert found.outcome == expected


@pytest.mark.parametrize("text", [b"", b"[]", b'{"version": 2, "read": []}'])
def test_a_record_that_cannot_be_read_counts_as_none(store: LocalObjectStore, text: bytes) -> None:
    assert LandingRecord.load(store.raw) is None
    store.raw.write(RECORD_KEY, text)
    assert LandingRecord.load(store.raw) is None


def test_a_tick_over_ten_thousand_objects_asks_the_store_a_fixed_number_of_times(
    instance: dg.DagsterInstance, store: LocalObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = store.raw.local_path("landing/cat/0.png")
    assert folder is not None
    folder.parent.mkdir(parents=True)
    long_ago = time.time() - 3600
    for number in range(10_000):
        path = folder.with_name(f"{number}.png")
        path.write_bytes(b"x")
        os.utime(path, (long_ago, long_ago))
    asked: list[str] = []
    for name in ("list", "read", "stat", "exists", "open", "download"):
        original = getattr(FolderStore, name)

        def counted(*arguments: object, _name: str = name, _original=original, **options: object):
            asked.append(_name)
            return _original(*arguments, **options)

        monkeypatch.setattr(FolderStore, name, counted)
    before = time.process_time()
    first = tick(instance, store)
    run_for(instance, first, dg.DagsterRunStatus.SUCCESS)
    build(store)
    assert "has already used the 10000 objects" in reason_of(tick(instance, store, first.cursor))
    assert time.process_time() - before < 60, "Dagster gives a tick one minute"
    assert len(asked) < 20
