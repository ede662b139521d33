"""Parity checks on models that differ. Equal models are compared in tests/local and tests/cluster."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from cifar_assets.assets.common import AccuracyGate
from cifar_assets.assets.record import DATA_VERSION_TAG
from cifar_assets.contracts import CLASSES
from cifar_assets.model_package import ENVIRONMENT_FILE
from resources.argo.local import LocalPipeline
from resources.digests import canonical_json
from resources.mlflow.resource import LocalMlflow
from resources.object_store.resource import LocalObjectStore
from tests.fixtures.cifar10 import ARGO_TRAINED_MODEL, TRAINED_MODEL, argo_parity_checks, argo_trained_model
from tests.fixtures.models import store_model

ENVIRONMENT = {"processes": 1, "threads": 2, "device": "cpu", "precision": "float32", "cpu": "some", "packages": {}}


class Pair:
    """Models of both pipelines in one store, and the checks on them."""

    def __init__(self, folder: Path):
        self._resource = LocalObjectStore(path=str(folder))
        self._instance = dg.DagsterInstance.ephemeral()

    def model(
        self, key: dg.AssetKey, *, weights: bytes = b"weights", seed: int = 0, gate: str = "passed", **changes: Any
    ) -> str:
        environment = {**ENVIRONMENT, **changes.get("environment", {})}
        files = {ENVIRONMENT_FILE: canonical_json(environment), **changes.get("files", {})}
        digest = store_model(
            self._resource.models,
            changes.get("metrics"),
            weights=weights,
            seed=seed,
            files=files,
            classes=changes.get("classes", CLASSES),
        )
        metadata = {"threshold": changes.get("threshold", 0.75), "gate": gate}
        event = dg.AssetMaterialization(key, metadata=metadata, tags={DATA_VERSION_TAG: digest})
        self._instance.report_runless_asset_event(event)
        return digest

    def checks(self) -> dict[str, tuple[bool, str]]:
        selection = dg.AssetSelection.checks(argo_parity_checks)
        definitions = dg.Definitions(
            asset_checks=[argo_parity_checks],
            jobs=[dg.define_asset_job("compare", selection=selection)],
            resources={"object_store": self._resource},
        )
        result = definitions.resolve_job_def("compare").execute_in_process(instance=self._instance)
        found = result.get_asset_check_evaluations()
        return {evaluation.check_name: (evaluation.passed, str(evaluation.description)) for evaluation in found}


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


def failed(checks: Mapping[str, tuple[bool, str]]) -> dict[str, str]:
    return {name: text for name, (passed, text) in checks.items() if not passed}


def test_both_pipelines_produce_one_model(pair: Pair) -> None:
    assert pair.model(TRAINED_MODEL) == pair.model(ARGO_TRAINED_MODEL)
    checks = pair.checks()
    assert len(checks) == 5
    assert not failed(checks)


def test_a_twin_is_found_among_earlier_models(pair: Pair) -> None:
    digest = pair.model(TRAINED_MODEL)
    pair.model(TRAINED_MODEL, seed=7)
    pair.model(ARGO_TRAINED_MODEL)
    assert digest in pair.checks()["same_inputs"][1]
    assert not failed(pair.checks())


def test_nothing_to_compare_with(pair: Pair) -> None:
    pair.model(TRAINED_MODEL, seed=7)
    digest = pair.model(ARGO_TRAINED_MODEL)
    assert set(failed(pair.checks())) == {
        "same_inputs",
        "same_artefacts",
        "same_metrics",
        "same_weights",
        "same_verdict",
    }
    assert digest in pair.checks()["same_inputs"][1]


def test_other_weights_of_as_many_processes(pair: Pair) -> None:
    pair.model(TRAINED_MODEL)
    pair.model(ARGO_TRAINED_MODEL, weights=b"other", environment={"threads": 4})
    assert failed(pair.checks()) == {
        "same_weights": "The weights differ. Between Argo and Dagster: threads 4 and 2.",
    }


def test_other_weights_of_more_processes_are_accepted(pair: Pair) -> None:
    pair.model(TRAINED_MODEL)
    pair.model(ARGO_TRAINED_MODEL, weights=b"other", environment={"processes": 2})
    assert not failed(pair.checks())
    assert "processes 2 and 1" in pair.checks()["same_weights"][1]


def test_a_file_and_a_metric_more(pair: Pair) -> None:
    pair.model(TRAINED_MODEL)
    pair.model(ARGO_TRAINED_MODEL, metrics={"speed": 1.0}, files={"extra.txt": b""})
    found = failed(pair.checks())
    assert "['extra.txt']" in found["same_artefacts"]
    assert "['speed']" in found["same_metrics"]


@pytest.mark.parametrize(("accuracy", "gate"), [(0.1, "refused"), (0.11, "passed")])
def test_models_of_other_images_have_to_be_better_than_guessing_in_both(pair: Pair, accuracy: float, gate: str) -> None:
    for key in (TRAINED_MODEL, ARGO_TRAINED_MODEL):
        pair.model(key, gate=gate, classes=("cat", "dog"), threshold=0.1, metrics={"test_accuracy": accuracy})
    assert not failed(pair.checks())


def test_another_verdict(pair: Pair) -> None:
    pair.model(TRAINED_MODEL)
    pair.model(ARGO_TRAINED_MODEL, gate="refused")
    found = failed(pair.checks())
    assert found.keys() == {"same_verdict"}
    assert "Argo: refused. The gate: passed" in found["same_verdict"]


def test_materialize_all_leaves_the_twin_out(tmp_path: Path) -> None:
    @dg.asset(key=TRAINED_MODEL)
    def trained() -> None: ...

    definitions = dg.Definitions(
        assets=[trained, argo_trained_model],
        asset_checks=[argo_parity_checks],
        resources={
            "object_store": LocalObjectStore(path=str(tmp_path)),
            "mlflow": LocalMlflow(path=str(tmp_path / "mlflow")),
            "argo": LocalPipeline(),
            "gate": AccuracyGate(threshold=0.85),
        },
    )
    everything = definitions.resolve_implicit_global_asset_job_def()
    result = everything.execute_in_process(asset_selection=[TRAINED_MODEL, ARGO_TRAINED_MODEL])
    assert result.success
    assert [event.asset_key for event in result.get_asset_materialization_events()] == [TRAINED_MODEL]
    assert not result.get_asset_check_evaluations()
