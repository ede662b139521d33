"""The Kubeflow pipeline, run by KFP's local runner on a small dataset, each step in a separate process."""

import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from cifar_assets.gate import judge
from resources.object_store import FolderStore
from tests.fixtures.tiny_data import TINY_RECIPE, TinyData, store_tiny_data

ROOT = Path(__file__).parents[2]
local: Any = pytest.importorskip("kfp.local", reason="the extra kfp is not installed")


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return runpy.run_path(str(ROOT / "k8s/kfp/pipeline.py"))["cifar10_pipeline"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """KFP's runner looks up `python3` in PATH: it has to be the one with this project installed."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    local.init(runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "kfp"))
    return tmp_path


@pytest.fixture
def tiny(folder: Path) -> TinyData:
    return store_tiny_data(FolderStore(folder / "store"))


def run(pipeline: Any, folder: Path, **parameters: Any) -> Any:
    defaults = {"recipe": "fast", "overrides": json.dumps(TINY_RECIPE), "execution": '{"threads": 1}', "threshold": "0"}
    places = {"store": str(folder / "store"), "outputs": str(folder / "outputs")}
    return pipeline(**{**defaults, **places, **parameters})


@pytest.mark.filterwarnings("ignore")
def test_four_steps_produce_a_model(pipeline: Any, folder: Path, tiny: TinyData) -> None:
    report = json.loads(run(pipeline, folder).output)
    manifest, verdict = judge(FolderStore(folder / "store" / "models"), report["model_digest"], 0.0)
    assert manifest.dataset_digest == tiny.processed
    assert verdict.numbers["test_accuracy"] == report["test_accuracy"]
    assert report["passed"] is True


@pytest.mark.filterwarnings("ignore")
def test_missing_data_fails_the_first_step(
    pipeline: Any, folder: Path, tiny: TinyData, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError, match="verify-data"):
        run(pipeline, folder, dataset="f" * 64)
    captured = capfd.readouterr()
    assert f"There is no processed version {'f' * 64}" in captured.out + captured.err
    assert not (folder / "store" / "models").exists()
