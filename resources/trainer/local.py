"""Training as a process on this machine: the same command a pod runs, through Dagster Pipes."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import dagster as dg
from pydantic import Field

from resources.errors import TrainingError
from resources.interrupts import sleep
from resources.run_liveness import inherited_locks
from resources.trainer.contract import EXIT_BAD_SPEC, EXIT_RESUME, JOB_SPEC_VARIABLE, TrainingSpec
from resources.trainer.interface import TrainerResource, TrainingMessages, TrainingResult, TrainingScale

_POLL_SECONDS = 0.2
_CONTINUE = "Materialize trained_model again to continue from its checkpoint."
_PLACE_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
"""Set by torchrun and the training operator for their processes. PET_* are options of torchrun."""


class LocalTrainer(TrainerResource):
    """Starts `python -m <module>` (in more than one process by `<module>.launch`) and relays its messages."""

    stop_grace_seconds: float = Field(
        default=60.0,
        description="How long a cancelled training may take to write its checkpoint before it is killed.",
    )

    def train(
        self,
        context: dg.AssetExecutionContext,
        spec: TrainingSpec,
        scale: TrainingScale,
        child_environment: Mapping[str, str],
    ) -> TrainingResult:
        messages = TrainingMessages(context)
        with dg.open_pipes_session(
            context=context,
            context_injector=dg.PipesTempFileContextInjector(),
            message_reader=dg.PipesTempFileMessageReader(),
        ) as session:
            process = subprocess.Popen(
                self._command((scale.replicas or 1) * (scale.nproc_per_node or 1)),
                env={
                    **own_environment(),
                    **child_environment,
                    **session.get_bootstrap_env_vars(),
                    JOB_SPEC_VARIABLE: spec.model_dump_json(),
                    "PYTHONUNBUFFERED": "1",
                },
                start_new_session=True,
                pass_fds=inherited_locks(),
            )
            try:
                while process.poll() is None:
                    messages.handle_new(session.get_custom_messages())
                    sleep(_POLL_SECONDS)
            finally:
                if process.poll() is None:
                    context.log.info("Stopping the trainer; it writes a checkpoint first.")
                    stop_group(process, self.stop_grace_seconds)
        messages.handle_new(session.get_custom_messages())
        if process.returncode:
            interrupted = process.returncode < 0 or process.returncode == EXIT_RESUME
            raise TrainingError(_failure(process.returncode), transient=interrupted)
        return messages.result()

    def _command(self, num_processes: int) -> list[str]:
        several = [f"{self.module}.launch", "--standalone", f"--nproc-per-node={num_processes}"]
        return [*following_parent(), sys.executable, "-m", *(several if num_processes > 1 else [self.module])]


def stop_group(process: subprocess.Popen[Any], grace_seconds: float) -> None:
    """End a process that leads its group, and with it the group: by SIGTERM, after the grace time by SIGKILL."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(grace_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def following_parent() -> list[str]:
    """Beginning of a command that is told to stop when this process is killed outright, where the kernel offers it."""
    return ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []


def own_environment() -> dict[str, str]:
    """This process's environment without what would make the trainer wait for processes on other machines."""
    return {k: v for k, v in os.environ.items() if k not in _PLACE_VARIABLES and not k.startswith("PET_")}


def _failure(code: int) -> str:
    if code == EXIT_RESUME:
        return (
            "The trainer was told to stop, or lost one of its processes or the object store; its log (stdout and "
            f"stderr of this step) says which. {_CONTINUE}"
        )
    if code == EXIT_BAD_SPEC:
        return (
            "The trainer refused its job, or the training diverged: the last lines of its log name the setting or the "
            "object to correct."
        )
    if code < 0:
        name = signal.Signals(-code).name
        hint = " The kernel does this when memory runs out: use a smaller batch." if name == "SIGKILL" else ""
        return f"The trainer was ended by {name}.{hint} {_CONTINUE}"
    return f"The trainer failed with exit code {code}: the last lines of its log (stderr of this step) say why."
