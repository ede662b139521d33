"""The steps as processes of this machine: none outlives the process that runs them."""

import os
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RUN_STEP = "import sys; from resources.argo.local import LocalPipeline; LocalPipeline()._step('processed', sys.argv[1])"


@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv")
def test_a_step_ends_when_the_process_that_runs_it_is_killed(tmp_path: Path) -> None:
    plan = tmp_path / "plan"
    os.mkfifo(plan)
    command = [sys.executable, "-c", RUN_STEP, f"--plan={plan}"]
    # Opens once the step reads it, and waits for what never comes.
    with subprocess.Popen(command) as process, plan.open("wb", buffering=0) as held_open:
        process.kill()
        ended = select.poll()
        ended.register(held_open, select.POLLERR)
        assert ended.poll(20_000)
