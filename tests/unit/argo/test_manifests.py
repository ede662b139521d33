"""The committed workflow, checked without a cluster. tests/cluster/test_argo.py runs it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cifar_assets.pipeline_steps.__main__ import main
from resources.argo.template import RESOURCE_IS_RETRIED

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "k8s" / "argo"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


PIPELINE = documents("pipeline.yaml")[0]["spec"]
TEMPLATES: dict[str, dict[str, Any]] = {
    template["name"]: template
    for template in [*PIPELINE["templates"], *documents("train.yaml")[0]["spec"]["templates"]]
}
STEPS = [name for name, template in TEMPLATES.items() if "steps" not in template]
COMMANDS = [name for name in STEPS if TEMPLATES[name].get("container")]


def parameters(spec: dict[str, Any]) -> dict[str, str]:
    return {parameter["name"]: parameter["value"] for parameter in spec["arguments"]["parameters"]}


def test_parameters_and_their_defaults() -> None:
    defaults = {
        "dataset": "current",
        "overrides": "{}",
        "execution": "{}",
        "seed": "0",
        "replicas": "1",
        "threshold": "",
    }
    assert {name: parameters(PIPELINE)[name] for name in defaults} == defaults


@pytest.mark.parametrize("name", STEPS)
def test_every_step_has_a_deadline_within_the_workflows(name: str) -> None:
    assert TEMPLATES[name]["activeDeadlineSeconds"] < PIPELINE["activeDeadlineSeconds"]


def test_finished_workflows_are_cleaned_up() -> None:
    assert PIPELINE["ttlStrategy"]["secondsAfterSuccess"] > 0
    assert PIPELINE["ttlStrategy"]["secondsAfterFailure"] > 0
    assert PIPELINE["podGC"]["strategy"] == "OnWorkflowSuccess"
    assert PIPELINE["onExit"] == "report"


@pytest.mark.parametrize("name", STEPS)
def test_only_infrastructure_faults_are_retried(name: str) -> None:
    """No step's own failures have an exit code that is retried. The training's condition has a separate test."""
    expression = TEMPLATES[name]["retryStrategy"]["expression"]
    if name not in COMMANDS:
        assert expression == RESOURCE_IS_RETRIED
        return
    assert re.findall(r'"(-?\d+)"', expression) == ["75", "137", "143"]


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_belong_to_the_project(name: str) -> None:
    command = TEMPLATES[name]["container"]["command"]
    assert command[:2] == ["python", "-m"]
    assert command[2] in ("cifar_assets.pipeline_steps", "resources.argo")
    assert all("\n" not in argument for argument in TEMPLATES[name]["container"]["args"])


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "report"])
def test_arguments_match_the_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    container = TEMPLATES[name]["container"]
    with pytest.raises(SystemExit):
        main([*container["command"][3:], "--help"])
    usage = capsys.readouterr().out
    for argument in container["args"]:
        assert argument.partition("=")[0] in usage


@pytest.mark.parametrize("name", COMMANDS)
def test_pods_are_restricted(name: str) -> None:
    assert PIPELINE["securityContext"]["runAsNonRoot"] is True
    assert PIPELINE["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    security = TEMPLATES[name]["container"]["securityContext"]
    assert security["allowPrivilegeEscalation"] is False
    assert security["readOnlyRootFilesystem"] is True
    assert security["capabilities"]["drop"] == ["ALL"]
    assert "memory" in TEMPLATES[name]["container"]["resources"]["limits"]


def test_roles_are_in_the_docs_and_name_no_wildcard() -> None:
    table = (ROOT / "docs/argo.md").read_text()
    roles = [document for document in documents("access.yaml") if document["kind"] == "Role"]
    assert len(roles) == 3
    for role in roles:
        for rule in role["rules"]:
            assert "*" not in (*rule["verbs"], *rule["resources"], *rule["apiGroups"])
            (resource,) = rule["resources"]
            assert f"| `{role['metadata']['name']}` | `{resource}` | {', '.join(rule['verbs'])} |" in table


def test_training_step_may_not_read_other_objects() -> None:
    (role,) = [d for d in documents("access.yaml") if d["kind"] == "Role" and d["metadata"]["name"] == "argo-workflow"]
    allowed = {resource: rule["verbs"] for rule in role["rules"] for resource in rule["resources"]}
    assert allowed == {"workflowtaskresults": ["create", "patch"], "pytorchjobs": ["create", "get"]}
    assert PIPELINE["serviceAccountName"] == "argo-workflow"


@pytest.mark.parametrize("name", ["workflow.yaml", "demo.yaml"])
def test_each_workflow_has_a_generated_name(name: str) -> None:
    (workflow,) = documents(name)
    assert workflow["metadata"].get("generateName")
    assert workflow["spec"]["workflowTemplateRef"] == {"name": "cifar10-pipeline"}
    assert workflow["spec"].get("entrypoint", PIPELINE["entrypoint"]) in TEMPLATES


def test_nightly_run_is_suspended_and_never_overlaps() -> None:
    (cron,) = documents("cron.yaml")
    assert cron["spec"]["suspend"] is True
    assert cron["spec"]["concurrencyPolicy"] == "Forbid"
    assert cron["spec"]["workflowSpec"]["workflowTemplateRef"] == {"name": "cifar10-pipeline"}


def test_every_file_belongs_to_the_kustomization_or_is_created_by_hand() -> None:
    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    created = {"workflow.yaml", "demo.yaml"}
    files = {path.name for path in FOLDER.glob("*.yaml")} - {"kustomization.yaml", "train.settings.yaml"}
    assert files == set(kustomization["resources"]) | created


def test_json_parameters_are_valid_json() -> None:
    for name in ("overrides", "execution"):
        assert json.loads(parameters(PIPELINE)[name]) == {}
