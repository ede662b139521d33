"""examples/job_component: a YAML file defines an asset that trains in a job, on the fake cluster."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from dagster_pipes import PipesContext, encode_param

from resources.kubernetes.component import PipesJobComponent
from resources.kubernetes.errors import SettingsError
from resources.pipes_store import STORE_URI_PARAM
from resources.pytorch_job.component import PipesPyTorchJobComponent
from resources.train_job.component import PipesTrainJobComponent
from tests.unit.pytorch_job.fake_cluster import KINDS, FakeCluster, Kind
from tests.unit.pytorch_job.test_messages import CONTEXT

ROOT = Path(__file__).parents[3]
PROJECT = ROOT / "examples/job_component"
DEFINED = PROJECT / "job_component/defs/language_model/defs.yaml"
COMPONENTS: dict[str, type[PipesJobComponent]] = {
    "pytorch_job": PipesPyTorchJobComponent,
    "train_job": PipesTrainJobComponent,
}


def connected(monkeypatch: pytest.MonkeyPatch, kind: Kind) -> FakeCluster:
    cluster = FakeCluster(kind=kind)
    monkeypatch.setattr(kind.client, "production", lambda: kind.client(cluster, cluster))
    monkeypatch.setattr(PipesContext, "_instance", None)
    return cluster


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dg.Definitions:
    for name, value in {"IMAGE": "image:1", "STORE": tmp_path.as_uri(), "NAMESPACE": "space"}.items():
        monkeypatch.setenv(f"EXAMPLE_{name}", value)
    monkeypatch.syspath_prepend(PROJECT)
    return dg.load_from_defs_folder(path_within_project=PROJECT / "job_component")


def test_example_trains_what_its_yaml_file_says(
    example: dg.Definitions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = connected(monkeypatch, KINDS[1])

    def act(cluster: FakeCluster, name: str) -> None:
        launch_id = cluster.jobs[name]["metadata"]["annotations"]["dagster/train-job-launch"]
        context = {**CONTEXT, "asset_keys": ["language_model"], "extras": {"epochs": 3}}
        with monkeypatch.context() as patch:
            patch.setenv("DAGSTER_PIPES_CONTEXT", encode_param({"data": context}))
            uri = (tmp_path / "messages" / launch_id).as_uri()
            patch.setenv("DAGSTER_PIPES_MESSAGES", encode_param({STORE_URI_PARAM: uri}))
            exec(cluster.jobs[name]["spec"]["trainer"]["command"][-1], {"__name__": "__main__"})
        cluster.condition(name, "Succeeded")

    cluster.on_created = act
    result = example.resolve_implicit_global_asset_job_def().execute_in_process()
    (materialization,) = result.asset_materializations_for_node("language_model")
    assert materialization.metadata["loss"].value == 0.125
    (job,) = cluster.jobs.values()
    assert job["spec"]["runtimeRef"]["name"] == "cifar-trainer"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.key)
def test_component_of_each_kind_runs_a_job_of_that_kind(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = connected(monkeypatch, kind)
    cluster.on_created = lambda cluster, name: cluster.condition(name, "Succeeded")
    component = COMPONENTS[kind.key](
        name="trained", assets=[dg.AssetSpec("model")], job={"image": "image:1"}, message_store=tmp_path.as_uri()
    )
    context: Any = None
    component.build_defs(context).resolve_implicit_global_asset_job_def().execute_in_process(raise_on_error=False)
    (name,) = cluster.jobs
    assert name.startswith("trained-")


@pytest.mark.parametrize("component", COMPONENTS.values())
def test_wrong_settings_are_refused_when_the_file_is_loaded(component: type[PipesJobComponent], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"Component trained: `job` is not a valid \w+JobConfig\. imgae: "):
        component(name="trained", assets=[], job={"image": "x", "imgae": "y"}, message_store=tmp_path.as_uri())


def test_scaffold_writes_a_file_of_that_type(tmp_path: Path) -> None:
    """`dg scaffold defs` as a user of the example calls it, in a copy of the project."""
    files = {PROJECT / "pyproject.toml", *(PROJECT / "job_component").glob("*.py")}
    for path in files:
        copy = tmp_path / path.relative_to(PROJECT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text())
    (tmp_path / "job_component/defs").mkdir()
    kind = f"{PipesTrainJobComponent.__module__}.{PipesTrainJobComponent.__name__}"
    subprocess.run(
        [Path(sys.executable).with_name("dg"), "scaffold", "defs", kind, "another"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "DAGSTER_DG_CLI_CONFIG": str(tmp_path / "none")},
        capture_output=True,
        text=True,
        check=True,
    )
    written = yaml.safe_load((tmp_path / "job_component/defs/another/defs.yaml").read_text())
    assert written["type"] == kind
