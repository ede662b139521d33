"""The steps as local processes: none outlives the process that runs them."""

import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

import pytest

RUN_STEP = "import sys; from resources.argo.local import LocalPipeline; LocalPipeline()._step('processed', sys.argv[1])"


def open_once_read(plan: Path, process: subprocess.Popen[bytes]) -> BinaryIO:
    """The write end of a pipe, once the step is reading from it and waits for data that never comes."""
    while process.poll() is None:
        try:
            return open(os.open(plan, os.O_WRONLY | os.O_NONBLOCK), "wb", buffering=0)
        except OSError:  # nobody reads yet
            time.sleep(0.05)
    pytest.fail("the step ended before it read its plan")


@pytest.mark.skipif(not shutil.which("setpriv"), reason="needs setpriv")
def test_a_step_ends_when_the_process_that_runs_it_is_killed(tmp_path: Path) -> None:
    plan = tmp_path / "plan"
    os.mkfifo(plan)
    command = [sys.executable, "-c", RUN_STEP, f"--plan={plan}"]
    with subprocess.Popen(command) as process, open_once_read(plan, process) as held_open:
        process.kill()
        ended = select.poll()
        ended.register(held_open, select.POLLERR)
        assert ended.poll(400_000)
