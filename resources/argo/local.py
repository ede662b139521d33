"""The four steps on this machine, one process after another: the commands of the workflow's pods, without a cluster."""

import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path

import dagster as dg
from pydantic import Field

from resources.argo.interface import PipelineRequest, PipelineResource, PipelineResult, parse_result
from resources.errors import TrainingError
from resources.run_liveness import inherited_locks
from resources.trainer.local import following_parent, own_environment, stop_group

_TAIL_LINES = 30


class LocalPipeline(PipelineResource):
    """Starts `python -m <module>` for each step. Trains in one process, whatever `replicas` is."""

    module: str = Field(default="cifar_assets.pipeline_steps", description="Python module that runs a step.")
    store_path: str = Field(default=".cifar/store", description="Folder that contains the buckets.")
    stop_grace_seconds: float = Field(
        default=60.0, description="How long a canceled step may take to write its checkpoint before it is killed."
    )

    def run(self, context: dg.AssetExecutionContext, request: PipelineRequest) -> PipelineResult:
        run = f"{context.run.run_id}.{context.retry_number}"
        parameters = {**request.parameters(), "replicas": "1"}
        threshold = parameters.pop("threshold")
        with tempfile.TemporaryDirectory(prefix="cifar-pipeline-") as folder:
            outputs, plan = f"--outputs={folder}", f"--plan={folder}/plan"
            asked = [f"--{name}={value}" for name, value in parameters.items()]
            self._step("data", f"--run={run}", *asked, outputs)
            self._step("processed", plan)
            self._step("train", plan)
            report = Path(folder, "model")
            try:
                self._step("model", plan, f"--threshold={threshold}", outputs)
            except TrainingError:
                if not report.exists():
                    raise
            return parse_result(f"Local run {run}", report.read_text())

    def _step(self, *arguments: str) -> None:
        command = [*following_parent(), sys.executable, "-m", self.module, "--store", self.store_path]
        tail: deque[str] = deque(maxlen=_TAIL_LINES)
        with subprocess.Popen(
            [*command, *arguments],
            env={**own_environment(), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            pass_fds=inherited_locks(),
        ) as process:
            try:
                for line in process.stdout or ():
                    sys.stdout.write(f"[{arguments[0]}] {line}")
                    tail.append(line)
                process.wait()
            finally:
                if process.poll() is None:
                    stop_group(process, self.stop_grace_seconds)
        if process.returncode:
            lines = "".join(f"    {line}" for line in tail).rstrip()
            raise TrainingError(
                f"The pipeline failed at step {arguments[0]} with exit code {process.returncode}. "
                f"Last lines of {arguments[0]}:\n{lines}"
            )
