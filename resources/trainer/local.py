"""Training as a local process: the same command as in a pod, through Dagster Pipes."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import Field

from resources.errors import TrainingError
from resources.interrupts import sleep
from resources.object_store import FolderStore
from resources.pipes_reader import PipesStoreMessageReader
from resources.run_liveness import inherited_locks
from resources.step_context import StepContext
from resources.trainer.contract import EXIT_BAD_SPEC, EXIT_RESUME, JOB_SPEC_VARIABLE, TrainingSpec
from resources.trainer.interface import TrainerResource, TrainingMessages, TrainingResult, TrainingScale

_POLL_SECONDS = 0.2
_READ_TIMEOUT_SECONDS = 30.0
_CONTINUE = "Start the same training again to continue from its checkpoint."
_PLACE_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
"""Set by torchrun and the training operator for their processes. PET_* are options of torchrun."""


class LocalTrainer(TrainerResource):
    """Starts `python -m <module>` (or `<module>.launch` for more than one process) and relays its messages."""

    stop_grace_seconds: float = Field(
        default=60.0, description="How long a canceled training may take to write its checkpoint before it is killed."
    )

    def train(
        self,
        context: StepContext,
        spec: TrainingSpec,
        scale: TrainingScale,
        child_environment: Mapping[str, str],
    ) -> TrainingResult:
        with closing(TrainingMessages(context)) as messages, _pipes_session(context, messages) as (session, reader):
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
                    reader.poll()
                    sleep(_POLL_SECONDS)
            finally:
                if process.poll() is None:
                    context.log.info("Stopping the trainer; it writes a checkpoint first.")
                    stop_group(process, self.stop_grace_seconds)
            reader.drain(timeout_seconds=_READ_TIMEOUT_SECONDS, clock=time.monotonic, sleeper=sleep)
        if process.returncode:
            interrupted = process.returncode < 0 or process.returncode == EXIT_RESUME
            raise TrainingError(_failure(process.returncode), transient=interrupted)
        return messages.result()

    def _command(self, num_processes: int) -> list[str]:
        several = [f"{self.module}.launch", "--standalone", f"--nproc-per-node={num_processes}"]
        return [*following_parent(), sys.executable, "-m", *(several if num_processes > 1 else [self.module])]


@contextmanager
def _pipes_session(
    context: StepContext, messages: TrainingMessages
) -> Iterator[tuple[dg.PipesSession, PipesStoreMessageReader]]:
    with tempfile.TemporaryDirectory(prefix="cifar-messages-") as folder:
        reader = PipesStoreMessageReader(
            FolderStore(Path(folder)),
            launch_id="training",
            run_id=context.run.run_id,
            logger=context.log,
            on_message=lambda payload, replayed: messages.handle(payload),
        )
        injector = dg.PipesEnvContextInjector()
        with dg.open_pipes_session(context=context, context_injector=injector, message_reader=reader) as session:
            yield session, reader


def stop_group(process: subprocess.Popen[Any], grace_seconds: float) -> None:
    """End a process group by its leader: with SIGTERM, after the grace period with SIGKILL."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(grace_seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def following_parent() -> list[str]:
    """Command prefix that makes the child stop if this process is killed, if the kernel supports it."""
    return ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []


def own_environment() -> dict[str, str]:
    """This process's environment without variables that would make the trainer wait for other machines."""
    return {k: v for k, v in os.environ.items() if k not in _PLACE_VARIABLES and not k.startswith("PET_")}


def _failure(code: int) -> str:
    if code == EXIT_RESUME:
        return (
            "The trainer was asked to stop, or lost one of its processes or the object store; see its log (stdout "
            f"and stderr of this step). {_CONTINUE}"
        )
    if code == EXIT_BAD_SPEC:
        return (
            "The trainer rejected its job, or the training diverged: the last lines of its log name the setting or "
            "the object to correct."
        )
    if code < 0:
        name = signal.Signals(-code).name
        hint = " The kernel does this if memory runs out: use a smaller batch." if name == "SIGKILL" else ""
        return f"The trainer was terminated by {name}.{hint} {_CONTINUE}"
    return f"The trainer failed with exit code {code}: see the last lines of its log (stderr of this step)."
