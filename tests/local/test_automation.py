"""The real daemon finds landed data, retrains and serves; if a model is refused, the old one is still served."""

import io
import json
import os
import time
from collections.abc import Iterator, Sequence

import dagster as dg
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dagster._core.scheduler.instigation import InstigatorTick, TickStatus
from PIL import Image

from cifar_assets.assets.record import data_version
from cifar_assets.dataset.versions.raw import read_raw
from cifar_assets.demo import FOUR_ASSETS
from resources.inference_service.client import InferenceClient
from resources.object_store.resource import LocalObjectStore
from tests.fixtures.cifar10 import INFERENCE_SERVICE, RAW_DATASET, TRAINED_MODEL
from tests.fixtures.pausing import pausing
from tests.fixtures.workspace import SMALL_TRAINING, Workspace, wait_until

pytestmark = pytest.mark.timeout(1800)

LANDED_KEY = "landing/cameras.parquet"
NUM_GOOD, NUM_BAD = 500, 20


def landed_parquet(num_good: int, num_bad: int, seed: int) -> bytes:
    """Rows in the Hugging Face layout: valid pictures of noise, and rows with a broken picture or an unknown label."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(num_good):
        buffer = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
        rows.append(({"bytes": buffer.getvalue(), "path": f"{number}.png"}, number % 10))
    for number in range(num_bad):
        content = rows[number][0]["bytes"][:60] if number % 2 else rows[number][0]["bytes"]
        rows.append(({"bytes": content, "path": f"bad-{number}.png"}, 3 if number % 2 else 17))
    random.shuffle(rows)
    table = pa.table({"img": [row[0] for row in rows], "label": [row[1] for row in rows]})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def served(workspace: Workspace) -> str:
    """Serves a first model and returns its digest."""
    done = workspace.materialize(FOUR_ASSETS, {"trained_model": SMALL_TRAINING})
    assert done.returncode == 0, done.stdout
    return client(workspace).served_model().model_digest


@pytest.fixture(scope="module")
def daemon(workspace: Workspace, served: str) -> Iterator[dg.DagsterInstance]:
    """A running `dagster dev` in the working folder."""
    variables = {"RETRAIN_CONFIG": json.dumps(SMALL_TRAINING), **pausing(workspace.folder / "pause")}
    with workspace.dagster_dev(**variables), workspace.instance() as instance:
        yield instance


def client(workspace: Workspace) -> InferenceClient:
    return InferenceClient(f"http://127.0.0.1:{workspace.environment['INFERENCE_SERVICE_PORT']}", timeout=300)


def land(*objects: tuple[str, bytes]) -> None:
    """Put the objects under landing/, dated an hour ago: the sensor skips recently modified files."""
    raw, an_hour_ago = LocalObjectStore().raw, time.time() - 3600
    for key, data in objects:
        raw.write(key, data)
    for key, _ in objects:
        path = raw.local_path(key)
        assert path is not None
        os.utime(path, (an_hour_ago, an_hour_ago))


def ten_rows(number: int) -> tuple[str, bytes]:
    return f"landing/more-{number}.parquet", landed_parquet(10, 0, seed=100 + number)


def ticks(instance: dg.DagsterInstance) -> Sequence[InstigatorTick]:
    """Evaluations of the landing sensor since its first run request."""
    (sensor,) = [state for state in instance.all_instigator_state() if state.name == "landing_sensor"]
    found = instance.get_ticks(sensor.instigator_origin_id, sensor.selector_id)
    requested = [tick.timestamp for tick in found if tick.status == TickStatus.SUCCESS]
    return [tick for tick in found if requested and tick.timestamp >= min(requested)]


def has_built(instance: dg.DagsterInstance, run_id: str) -> bool:
    event = instance.get_latest_materialization_event(RAW_DATASET)
    return event is not None and event.run_id == run_id


def landing_runs(instance: dg.DagsterInstance) -> list[dg.DagsterRun]:
    return [run for run in instance.get_runs() if "landing" in run.tags]


def test_landed_rows_are_trained_on_or_rejected_and_the_model_is_deployed(
    workspace: Workspace, served: str, daemon: dg.DagsterInstance
) -> None:
    """Five objects between two ticks trigger one run; three more during the training trigger one run after it."""
    raw = LocalObjectStore().raw
    raw.write("landing/.keep", b"")
    land((LANDED_KEY, landed_parquet(NUM_GOOD, NUM_BAD, seed=7)), *map(ten_rows, range(4)))
    wait_until(lambda: landing_runs(daemon), "the sensor to start a run")
    land(ten_rows(4))
    wait_until(lambda: len(ticks(daemon)) > 1, "a tick while it runs")
    wait_until(lambda: has_built(daemon, landing_runs(daemon)[-1].run_id), "the run to read what has landed")
    land(ten_rows(5), ten_rows(6))
    (workspace.folder / "pause").unlink()
    wait_until(lambda: len(landing_runs(daemon)) == 2, "the sensor to start the run that follows")
    wait_until(lambda: all(run.is_finished for run in landing_runs(daemon)), "the runs to end")
    first, second = (daemon.get_run_record_by_id(run.run_id) for run in reversed(landing_runs(daemon)))
    assert first is not None
    assert second is not None
    log = (workspace.folder / "dev.log").read_text()[-5000:]
    assert first.dagster_run.status == second.dagster_run.status == dg.DagsterRunStatus.SUCCESS, log
    assert first.end_time is not None
    assert second.start_time is not None
    assert second.start_time >= first.end_time

    event = daemon.get_latest_materialization_event(RAW_DATASET)
    assert event is not None
    made = event.asset_materialization
    assert made is not None
    assert event.run_id == second.dagster_run.run_id
    assert made.metadata["num_landed_rejected"].value == NUM_BAD
    landed = {item.key: item for item in read_raw(raw, data_version(made)).objects if item.role == "landed"}
    assert sum(item.used_rows for item in landed.values()) == NUM_GOOD + 7 * 10
    reasons = [json.loads(raw.read(info.key)) for info in raw.list("rejected/") if info.key.endswith(".json")]
    assert len(reasons) == 1

    now = client(workspace).served_model().model_digest
    assert now != served
    event = daemon.get_latest_materialization_event(INFERENCE_SERVICE)
    assert event is not None
    assert event.asset_materialization is not None
    assert event.asset_materialization.metadata["raw_digest"].value == data_version(made)
    assert event.asset_materialization.metadata["model_digest"].value == now


def test_landing_without_changes_does_not_train(daemon: dg.DagsterInstance) -> None:
    raw = LocalObjectStore().raw
    before = daemon.get_latest_materialization_event(TRAINED_MODEL)
    assert before is not None
    land(("landing/the-same-again.parquet", raw.read(LANDED_KEY)))
    wait_until(lambda: len(landing_runs(daemon)) == 3, "the sensor to look at the copy")
    wait_until(lambda: all(run.is_finished for run in landing_runs(daemon)), "the run to end")
    after = daemon.get_latest_materialization_event(TRAINED_MODEL)
    assert after is not None
    assert after.asset_materialization is not None
    assert before.asset_materialization is not None
    assert data_version(after.asset_materialization) == data_version(before.asset_materialization)
    observations = daemon.fetch_observations(TRAINED_MODEL, limit=100).records
    assert all(record.run_id != after.run_id for record in observations)
