"""The committed Kubeflow pipeline equals the compiled one, and has the steps of the Argo workflow."""

import runpy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parents[3] / "k8s" / "kfp"
pytest.importorskip("kfp", reason="the extra kfp is not installed")


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / "pipeline.yaml").read_text()))


def test_committed_yaml_is_compiled(tmp_path: Path) -> None:
    runpy.run_path(str(FOLDER / "pipeline.py"))["compile_to"](tmp_path / "pipeline.yaml")
    assert (tmp_path / "pipeline.yaml").read_text() == (FOLDER / "pipeline.yaml").read_text()


def test_steps_follow_each_other(compiled: list[dict[str, Any]]) -> None:
    tasks = compiled[0]["root"]["dag"]["tasks"]
    order = ["verify-data", "verify-processed", "train", "verify-model"]
    assert set(tasks) == set(order)
    for before, after in pairwise(order):
        assert before in tasks[after]["dependentTasks"]


def test_nothing_is_installed_when_a_step_starts(compiled: list[dict[str, Any]]) -> None:
    for executor in compiled[0]["deploymentSpec"]["executors"].values():
        assert "pip install" not in str(executor)


def test_steps_have_the_certificate_authority_if_it_exists(compiled: list[dict[str, Any]]) -> None:
    for executor in compiled[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
        (volume,) = executor["configMapAsVolume"]
        assert (volume["configMapName"], volume["mountPath"], volume["optional"]) == ("cifar-ca", "/etc/cifar-ca", True)
        (optional,) = (source for source in executor["configMapAsEnv"] if source.get("optional"))
        variables = {entry["envVar"] for entry in optional["keyToEnv"]}
        assert {"AWS_CA_BUNDLE", "MLFLOW_TRACKING_SERVER_CERT_PATH"} <= variables


def test_credentials_come_from_the_secret(compiled: list[dict[str, Any]]) -> None:
    executors = compiled[1]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert len(executors) == 4
    for name, executor in executors.items():
        secret, *others = executor["secretAsEnv"]
        assert secret["secretName"] == "object-store-pipeline"
        assert {entry["envVar"] for entry in secret["keyToEnv"]} == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
        signing = [(other["secretName"], other["optional"]) for other in others]
        assert signing == ([("model-signing", True)] if name == "exec-train" else [])
