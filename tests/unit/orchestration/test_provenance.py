"""What may be served: only a model that Dagster materialized and whose blocking checks all passed."""

import json
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from cifar_assets.assets.record import find_materialization, why_unproven
from cifar_assets.model_package import WEIGHTS_FILE
from tests.fixtures.cifar10 import ARGO_TRAINED_MODEL, INFERENCE_SERVICE, MODEL_CHECKS, PROCESSED_DATASET, TRAINED_MODEL
from tests.fixtures.models import store_model
from tests.fixtures.orchestration import World, failure

WRONG_ONNX = {"onnx_max_difference": 5.0}
BOTH = (TRAINED_MODEL, INFERENCE_SERVICE)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    world.known_data()
    yield world
    world.instance.dispose()


def test_a_checked_model_is_served_in_the_same_run_and_by_hand(world: World) -> None:
    assert world.materialize(*BOTH).success
    digest = world.newest(TRAINED_MODEL)
    assert world.deploy() is None
    assert world.deploy(digest) is None
    assert world.deployed() == [digest] * 3


@pytest.mark.parametrize(
    ("metrics", "check"),
    [
        (WRONG_ONNX, "onnx_equals_torch"),
        ({"test_loss": float("nan")}, "metrics_finite"),
        ({"test_accuracy": 0.4}, "accuracy_threshold"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_failed_blocking_check_stops_every_path(world: World, metrics: dict[str, float], check: str) -> None:
    assert not world.materialize(*BOTH, metrics=metrics).success
    digest = world.newest(TRAINED_MODEL)
    for refusal in (world.deploy(), world.deploy(digest), world.deploy(digest, threshold=0.0)):
        assert refusal is not None
        assert check in refusal
        assert digest in refusal
    assert world.deployed() == []


def test_a_model_whose_checks_did_not_run_is_refused_with_the_command_that_runs_them(world: World) -> None:
    refused = failure(world.materialize(*BOTH, checks=False), INFERENCE_SERVICE)
    digest = world.newest(TRAINED_MODEL)
    assert refused is not None
    for check in ("accuracy_threshold", "metrics_finite", "onnx_equals_torch"):
        assert f"the blocking check {check} of cifar10/trained_model never ran on {digest}" in refused
    assert "dg launch --assets cifar10/trained_model" in refused
    config = {TRAINED_MODEL: {"model_digest": digest}}  # as in the command
    assert world.materialize(TRAINED_MODEL, config=config).success
    assert world.deploy() is None


def test_a_stored_model_that_dagster_never_materialized_is_refused(world: World) -> None:
    world.train()
    forged = store_model(world.models, {"test_accuracy": 0.99}, dataset=world.newest(PROCESSED_DATASET), seed=9)
    world.report(ARGO_TRAINED_MODEL, forged)  # an asset whose checks only compare
    refused = world.deploy(forged)
    assert refused is not None
    assert f"this Dagster instance never materialized cifar10/trained_model as {forged}" in refused
    assert world.deployed() == []


def test_explicitly_named_model_records_its_origin(world: World) -> None:
    stored = store_model(world.models, dataset=world.newest(PROCESSED_DATASET), seed=9)
    assert world.materialize(TRAINED_MODEL, config={TRAINED_MODEL: {"model_digest": stored}}).success
    record = find_materialization(world.instance, TRAINED_MODEL, stored)
    assert record
    assert "whoever started this run is responsible" in str(record.materialization.metadata["origin"].value)
    assert world.deploy() is None


def test_a_named_model_is_checked_like_a_trained_one(world: World) -> None:
    stored = store_model(world.models, WRONG_ONNX, dataset=world.newest(PROCESSED_DATASET))
    config = {TRAINED_MODEL: {"model_digest": stored}}
    assert not world.materialize(*BOTH, config=config).success
    assert "onnx_equals_torch" in str(world.deploy(stored))
    assert world.deployed() == []


def test_forged_earlier_result_is_ignored(world: World) -> None:
    """Earlier releases read jobs/<identity>.json in the bucket."""
    forged = store_model(world.models, {"test_accuracy": 0.99}, dataset=world.newest(PROCESSED_DATASET), seed=9)
    note = {"model_digest": forged, "model_uri": "file:///x", "mlflow_run_id": None, "mlflow_model_version": None}
    for identity in identities(world):
        world.models.write(f"jobs/{identity}.json", json.dumps({**note, "resumed_from": None, "more": 1}).encode())
    config = {TRAINED_MODEL: {"reuse": True}}
    assert world.materialize(*BOTH, config=config).success
    assert world.deployed() == [world.newest(TRAINED_MODEL)]
    assert forged not in world.deployed()


def identities(world: World) -> list[str]:
    """Job identities of the trainings so far."""
    world.train()
    records = world.instance.fetch_materializations(TRAINED_MODEL, limit=10).records
    made = [record.asset_materialization for record in records if record.asset_materialization]
    return [str(each.metadata["job_identity"].value) for each in made]


def test_reuse_takes_the_model_of_the_same_job_without_training(world: World) -> None:
    first = world.train()
    again = world.train(config={TRAINED_MODEL: {"reuse": True}}, metrics={"test_accuracy": 0.9})
    assert again == first
    assert len(world.instance.fetch_observations(TRAINED_MODEL, limit=10).records) == 1
    other = world.train(config={TRAINED_MODEL: {"reuse": True, "seed": 1}})
    assert other != first
    assert world.deploy(first) is None


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_reuse_of_a_damaged_model_trains_it_again(world: World, damage: str) -> None:
    digest = world.train()
    key = f"{digest}/{WEIGHTS_FILE}"
    world.models.delete(key) if damage == "missing" else world.models.write(key, b"other")
    assert world.train(config={TRAINED_MODEL: {"reuse": True}}) == digest
    assert world.models.read(key) == b"weights"


def test_a_training_that_reports_another_jobs_model_fails(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    other = store_model(world.models, dataset=world.newest(PROCESSED_DATASET), seed=9)
    monkeypatch.setattr("tests.fixtures.orchestration.store_model", lambda *_, **__: other)
    result = world.materialize(TRAINED_MODEL)
    assert f"Model {other} has seed 9, this run asked for 0." in str(failure(result, TRAINED_MODEL))
    assert world.instance.get_latest_materialization_event(TRAINED_MODEL) is None


def test_later_failed_check_revokes_the_permission(world: World) -> None:
    digest = world.train()
    assert world.deploy() is None
    world.train(config={TRAINED_MODEL: {"model_digest": digest}}, threshold=0.9)  # checked again, more strictly
    assert "accuracy_threshold" in str(world.deploy(digest))
    world.train(config={TRAINED_MODEL: {"model_digest": digest}})
    assert world.deploy(digest) is None


def test_the_threshold_in_force_counts_as_well_as_the_check(world: World) -> None:
    digest = world.train()
    refused = world.deploy(digest, threshold=0.95)
    assert refused is not None
    assert "is below the threshold 0.9500" in refused


def test_rollback_to_a_model_whose_check_failed_since_is_refused(world: World) -> None:
    old = world.train()
    assert world.deploy() is None
    new = world.train(config={TRAINED_MODEL: {"seed": 1}})
    assert world.deploy() is None
    rollback = {INFERENCE_SERVICE: {"rollback": True}}
    assert world.deploy(config=rollback) is None
    assert world.deployed() == [old, new, old]
    world.train(config={TRAINED_MODEL: {"model_digest": new}}, threshold=0.9)
    assert "accuracy_threshold" in str(world.deploy(config=rollback))
    assert world.deployed() == [old, new, old]


def test_a_model_of_a_dataset_that_failed_its_check_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.data()
    monkeypatch.setattr("cifar_assets.dataset.versions.verdicts._MEAN_RANGE", (0.9, 0.95))
    assert not world.materialize(PROCESSED_DATASET, *BOTH).success
    refused = failure(world.materialize(*BOTH), INFERENCE_SERVICE)  # a later run that does not run the dataset's checks
    assert refused is not None
    assert "the blocking check statistics_in_range of cifar10/processed_dataset failed" in refused
    assert world.deployed() == []


def test_a_lost_history_needs_the_datasets_and_the_model_named_again(world: World) -> None:
    world.data()
    digest = world.train()
    world.instance.dispose()
    world.instance = dg.DagsterInstance.ephemeral()
    refused = world.deploy(digest)
    assert refused is not None
    assert "never materialized cifar10/trained_model" in refused
    assert "never materialized cifar10/processed_dataset" in refused
    world.data()
    assert world.materialize(TRAINED_MODEL, config={TRAINED_MODEL: {"model_digest": digest}}).success
    assert world.deploy() is None


def test_a_verdict_counts_for_the_version_it_names(world: World) -> None:
    """Two runs overlap: the check of one targets the materialization of the other."""
    mine = world.train()
    other = store_model(world.models, seed=3)
    world.report(TRAINED_MODEL, other)
    for check in MODEL_CHECKS:
        world.evaluate(check, passed=True, judged=mine)
    assert why_unproven(world.instance, TRAINED_MODEL, mine, MODEL_CHECKS) == []
    assert len(why_unproven(world.instance, TRAINED_MODEL, other, MODEL_CHECKS)) == 3


def test_a_verdict_without_a_version_counts_for_its_target(world: World) -> None:
    """The format from before evaluations named the version that they judged."""
    digest = world.train()
    world.evaluate(MODEL_CHECKS[0], passed=False, judged=None)
    (reason,) = why_unproven(world.instance, TRAINED_MODEL, digest, MODEL_CHECKS)
    assert f"{MODEL_CHECKS[0].name} of cifar10/trained_model failed for {digest}" in reason


def test_a_permission_is_found_behind_many_later_models(world: World) -> None:
    digest = world.train()
    for number in range(120):
        world.report(TRAINED_MODEL, f"{number:064x}")
        world.evaluate(MODEL_CHECKS[0], passed=False, judged=f"{number:064x}")
    assert why_unproven(world.instance, TRAINED_MODEL, digest, MODEL_CHECKS) == []
