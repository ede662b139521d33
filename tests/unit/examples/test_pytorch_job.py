"""examples/pytorch_job.py on the fake cluster; its script runs unchanged."""

import subprocess
import sys
from pathlib import Path

import pytest
from dagster_pipes import PipesContext, encode_param

from examples.pytorch_job import SCRIPT, PyTorchJobs, defs
from resources.pipes_store import STORE_URI_PARAM
from resources.pytorch_job import PyTorchJobClient
from tests.unit.pytorch_job.fake_cluster import FakeCluster
from tests.unit.pytorch_job.test_messages import CONTEXT

ROOT = Path(__file__).parents[3]
PROBE = """
import sys
from examples.pytorch_job import PyTorchJobs, defs
assert defs.resolve_asset_graph().get_all_asset_keys()
PyTorchJobs(image="image:1", store="file:///tmp", namespace="space").manifest()
print([name for name in sys.modules if name.split(".")[0] == "cifar_assets"])
"""


def test_example_imports_no_cifar_code() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_example_builds_a_manifest() -> None:
    manifest = PyTorchJobs(image="image:1", store="file:///tmp", namespace="space").manifest()
    (container,) = manifest["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"]  # pyright: ignore
    assert (container["image"], container["command"]) == ("image:1", ["python", "-c", SCRIPT])


def test_example_trains_through_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster()
    monkeypatch.setattr(PyTorchJobClient, "production", lambda: PyTorchJobClient(cluster, cluster))
    monkeypatch.setattr(PipesContext, "_instance", None)
    for name, value in {"IMAGE": "image:1", "STORE": tmp_path.as_uri(), "NAMESPACE": "space"}.items():
        monkeypatch.setenv(f"EXAMPLE_{name}", value)

    def act(cluster: FakeCluster, name: str) -> None:
        launch_id = cluster.jobs[name]["metadata"]["annotations"]["dagster/pytorch-job-launch"]
        context = {**CONTEXT, "asset_keys": ["language_model"], "extras": {"epochs": 3}}
        with monkeypatch.context() as patch:
            patch.setenv("DAGSTER_PIPES_CONTEXT", encode_param({"data": context}))
            uri = (tmp_path / "messages" / launch_id).as_uri()
            patch.setenv("DAGSTER_PIPES_MESSAGES", encode_param({STORE_URI_PARAM: uri}))
            exec(SCRIPT, {"__name__": "__main__"})
        cluster.condition(name, "Succeeded")

    cluster.on_created = act
    result = defs.resolve_implicit_global_asset_job_def().execute_in_process()
    (materialization,) = result.asset_materializations_for_node("language_model")
    assert materialization.metadata["loss"].value == 0.125
    assert str(materialization.metadata["pytorch_job"].value).startswith("space/pytorch-job-")
