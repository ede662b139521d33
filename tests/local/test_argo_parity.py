"""The job argo_parity in the local deployment: the four steps as processes, and the checks that compare the models."""

import json
from typing import Any

import dagster as dg
import pytest

from cifar_assets.assets.record import data_version
from resources.object_store import FolderStore
from tests.fixtures.cifar10 import ARGO_TRAINED_MODEL, TRAINED_MODEL
from tests.fixtures.tiny_data import TINY_RECIPE, store_tiny_data
from tests.fixtures.workspace import Workspace

CHECKS = ("same_inputs", "same_artefacts", "same_metrics", "same_weights", "same_verdict")


@pytest.fixture(scope="module")
def trained(workspace: Workspace) -> str:
    """Materializes trained_model on a small dataset, far below the gate's threshold. Returns its digest."""
    data = store_tiny_data(FolderStore(workspace.folder / ".cifar" / "store"))
    config = {"overrides": TINY_RECIPE, "recipe": "fast", "dataset_digest": data.processed, "seed": 5}
    config["execution"] = {"threads": 1}
    done = workspace.materialize("cifar10/trained_model", {"trained_model": config})
    assert "accuracy_threshold" in done.stdout
    return newest(workspace, TRAINED_MODEL)


def newest(workspace: Workspace, key: dg.AssetKey) -> str:
    with workspace.instance() as instance:
        event = instance.get_latest_materialization_event(key)
    assert event
    assert event.asset_materialization
    return data_version(event.asset_materialization)


def argo_parity(workspace: Workspace, config: dict[str, Any] | None = None) -> tuple[str, dict[str, bool]]:
    """Run the job. Returns its output and the checks' verdicts."""
    command = ["-m", "dagster", "job", "execute", "-m", "cifar_assets.definitions", "-j", "argo_parity"]
    if config:
        command += ["--config-json", json.dumps({"ops": {"cifar10__argo_trained_model": {"config": config}}})]
    done = workspace.python(*command)
    with workspace.instance() as instance:
        run_id = instance.get_runs(limit=1)[0].run_id
        entries = instance.all_logs(run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION)
        events = [entry.get_dagster_event() for entry in entries]
    found = {e.asset_check_evaluation_data.check_name: e.asset_check_evaluation_data.passed for e in events}
    return done.stdout, found


def test_both_pipelines_produce_the_same_model_and_rejection(workspace: Workspace, trained: str) -> None:
    output, checks = argo_parity(workspace)
    assert checks == dict.fromkeys(CHECKS, True), output
    assert newest(workspace, ARGO_TRAINED_MODEL) == trained
    for step in ("data", "processed", "train", "model"):
        assert f"[{step}]" in output
    with workspace.instance() as instance:
        event = instance.get_latest_materialization_event(ARGO_TRAINED_MODEL)
    assert event
    assert event.asset_materialization
    metadata = event.asset_materialization.metadata
    assert metadata["gate"].value == "refused"
    assert metadata["repeats"].value == trained


def test_failed_step_is_reported_with_its_last_lines(workspace: Workspace, trained: str) -> None:
    raw = FolderStore(workspace.folder / ".cifar" / "store").at("raw-data")
    key = next(info.key for info in raw.list("objects/"))
    data = raw.read(key)
    raw.write(key, b"?" + data[1:])
    try:
        output, checks = argo_parity(workspace)
    finally:
        raw.write(key, data)
    assert "The pipeline failed at step data with exit code 1" in output
    assert key in output
    assert not checks
