"""A code location with one asset in a pool, for tests that kill its runs."""

import os
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg

from resources.run_liveness import inherited_locks, watched


class Work(dg.Config):
    """What the asset does: nothing, wait until it is killed, or the same with a child that outlives it."""

    kind: str = "quick"


@dg.asset(pool="training")
def model(config: Work) -> None:
    if config.kind == "child":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"], pass_fds=inherited_locks())
        Path("child").write_text(str(child.pid))
    if config.kind != "quick":
        Path(f"started-{os.getpid()}").touch()
        time.sleep(120)


defs = dg.Definitions(assets=[model], executor=watched(dg.in_process_executor))
