"""The example of docs/pytorch_job.md, run as it stands."""

import re
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster_pipes import PipesContext, PipesMappingParamsLoader, encode_param

from resources.pipes_store import STORE_URI_PARAM
from resources.pytorch_job.client import PyTorchJobClient
from tests.unit.pytorch_job.fake_cluster import FakeCluster
from tests.unit.pytorch_job.test_messages import CONTEXT

PAGE = Path(__file__).parents[3] / "docs/pytorch_job.md"


def test_example_trains_through_the_store(
    tmp_path: Path, cluster: FakeCluster, client: PyTorchJobClient, monkeypatch: pytest.MonkeyPatch
):
    asset_code, pod_code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    monkeypatch.setattr(PyTorchJobClient, "production", lambda **_: client)
    monkeypatch.setattr(PipesContext, "_instance", None)
    namespace: dict[str, Any] = {"__name__": "example"}
    monkeypatch.setitem(sys.modules, "example", dg)  # the decorator looks its module up
    exec(asset_code.replace("file:///shared/pipes", tmp_path.as_uri()), namespace)

    def act(cluster: FakeCluster, name: str) -> None:
        launch_id = cluster.jobs[name]["metadata"]["annotations"]["dagster/pytorch-job-launch"]
        params = {
            "DAGSTER_PIPES_CONTEXT": encode_param(
                {"data": {**CONTEXT, "asset_keys": ["language_model"], "extras": {"epochs": 3}}}
            ),
            "DAGSTER_PIPES_MESSAGES": encode_param({STORE_URI_PARAM: (tmp_path / "messages" / launch_id).as_uri()}),
        }
        with monkeypatch.context() as patch:
            for key, value in params.items():
                patch.setenv(key, value)
            exec(pod_code, {"__name__": "__main__"})
        cluster.condition(name, "Succeeded")

    assert PipesMappingParamsLoader({}).is_dagster_pipes_process() is False
    cluster.on_created = act
    result = namespace["defs"].resolve_implicit_global_asset_job_def().execute_in_process()
    (materialization,) = result.asset_materializations_for_node("language_model")
    assert materialization.metadata["loss"].value == 0.1
    assert str(materialization.metadata["pytorch_job"].value).startswith("default/pytorch-job-")
