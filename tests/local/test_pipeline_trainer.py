"""The trainer with the Pipes variables of the pipeline: how it refuses a job."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cifar_assets.pipeline_steps.__main__ import main
from cifar_assets.pipeline_steps.plan import parse_plan
from resources.object_store import FolderStore
from resources.trainer.contract import EXIT_BAD_SPEC
from tests.fixtures.tiny_data import TINY_RECIPE, store_tiny_data


@pytest.mark.parametrize("variables", ["pipes", "no pipes"])
def test_rejected_job_has_its_own_exit_code_and_reason(tmp_path: Path, variables: str) -> None:
    store_tiny_data(FolderStore(tmp_path / "store"), train=60, test=20)
    asked = ["--recipe=fast", f"--overrides={json.dumps(TINY_RECIPE)}", '--execution={"device": "cuda"}']
    outputs = tmp_path / "outputs"
    assert main(["--store", str(tmp_path / "store"), "data", "--run=run-1", *asked, f"--outputs={outputs}"]) == 0
    environment = parse_plan((outputs / "plan").read_text()).trainer_environment()
    if variables == "no pipes":
        environment = {"CIFAR_JOB_SPEC": environment["CIFAR_JOB_SPEC"]}
    done = subprocess.run(
        [sys.executable, "-m", "cifar_assets.training"],
        env={**os.environ, **environment, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == EXIT_BAD_SPEC, done.stdout + done.stderr
    assert "torch finds no GPU" in done.stdout
    assert "Logging error" not in done.stderr
    assert "Traceback" not in done.stderr
