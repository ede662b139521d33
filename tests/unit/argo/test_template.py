"""The committed training step equals the generated one, and cannot create two jobs."""

import uuid
from pathlib import Path
from typing import Any

import pytest
import yaml

from resources.argo.__main__ import main
from resources.argo.template import FAILURE_CONDITION, SUCCESS_CONDITION, TRAINER_VARIABLES, parameter_of
from resources.kubernetes.naming import check_name
from resources.pytorch_job import PyTorchJobConfig, build_pytorch_job_manifest

FOLDER = Path(__file__).parents[3] / "k8s" / "argo"
SETTINGS: dict[str, Any] = yaml.safe_load((FOLDER / "train.settings.yaml").read_text())
TEMPLATES: dict[str, dict[str, Any]] = {
    template["name"]: template for template in yaml.safe_load((FOLDER / "train.yaml").read_text())["spec"]["templates"]
}


def test_committed_yaml_is_generated(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(FOLDER / "train.settings.yaml")]) == 0
    assert capsys.readouterr().out == (FOLDER / "train.yaml").read_text()


def substituted(text: str, **parameters: str) -> dict[str, Any]:
    """The manifest with the parameters that Argo fills in."""
    values = {"workflow.uid": UID, "workflow.name": "run", "workflow.namespace": "cifar"}
    values |= {f"inputs.parameters.{name}": value for name, value in parameters.items()}
    for name, value in values.items():
        text = text.replace(f"{{{{{name}}}}}", value)
    assert "{{" not in text
    return yaml.safe_load(text)


UID = str(uuid.uuid4())
VALUES = {"image": "image", **{parameter_of(variable): f"of {variable}" for variable in TRAINER_VARIABLES}}


@pytest.mark.parametrize(("name", "replicas"), [("train", 1), ("train-replicas", 2), ("train-replicas", 5)])
def test_job_equals_the_one_dagster_creates_from_the_same_settings(name: str, replicas: int) -> None:
    found = substituted(TEMPLATES[name]["resource"]["manifest"], **VALUES, workers=str(replicas - 1))
    config = PyTorchJobConfig(**{**SETTINGS["config"], "image": "image", "replicas": replicas})
    labels = {"app.kubernetes.io/managed-by": "argo-workflow", "cifar/argo-workflow": "run"}
    env = {variable: f"of {variable}" for variable in TRAINER_VARIABLES}
    expected = build_pytorch_job_manifest(config, name=f"cifar10-{UID}", namespace="cifar", env=env, labels=labels)
    assert found == expected


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_second_submission_finds_the_first(name: str) -> None:
    resource = TEMPLATES[name]["resource"]
    metadata = substituted(resource["manifest"], **VALUES, workers="1")["metadata"]
    assert resource["action"] == "apply"
    assert metadata["name"] == f"cifar10-{UID}"
    assert "generateName" not in metadata
    check_name("PyTorchJob", metadata["name"], f"{metadata['name']}-worker-9999")


@pytest.mark.parametrize("name", TEMPLATES)
def test_job_is_owned_by_its_workflow_and_has_a_deadline(name: str) -> None:
    template = TEMPLATES[name]
    resource = template["resource"]
    assert resource["setOwnerReference"] is True
    assert resource["successCondition"] == SUCCESS_CONDITION
    assert resource["failureCondition"] == FAILURE_CONDITION
    job = substituted(resource["manifest"], **VALUES, workers="1")
    assert job["spec"]["runPolicy"]["activeDeadlineSeconds"] < template["activeDeadlineSeconds"]
    assert job["spec"]["runPolicy"]["ttlSecondsAfterFinished"] > 0


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("name: x\n", "'config'"), ("name: x\nconfig: {replicas: 0}\n", "replicas"), ("config", "mapping")],
)
def test_invalid_settings_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, complaint: str
) -> None:
    path = tmp_path / "my.settings.yaml"
    path.write_text(text)
    assert main(["train", str(path)]) == 2
    error = capsys.readouterr().err
    assert "my.settings.yaml" in error
    assert complaint in error
