"""The interface of all trainers: the scale, the result, and the messages sent during a training."""

import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import dagster as dg
from pydantic import Field, field_validator

from resources.errors import TrainingError
from resources.step_context import StepContext
from resources.trainer.contract import TrainingSpec


class TrainingScale(dg.Config):
    """Number of processes, and resources of each replica. An omitted or empty field uses the trainer's setting.

    The local trainer uses only the numbers of processes, which default to 1.
    """

    replicas: int | None = Field(default=None, ge=1, le=64, description="Pods: one master, the others workers.")
    nproc_per_node: int | None = Field(default=None, ge=1, le=64, description="Training processes in each replica.")
    cpu: str | None = Field(default=None, description="CPU of each replica, such as '2'.")
    memory: str | None = Field(default=None, description="Memory of each replica, such as '4Gi'.")
    gpu: int | None = Field(default=None, ge=0, le=16, description="GPUs of each replica.")

    @field_validator("cpu", "memory")
    @classmethod
    def _empty_is_omitted(cls, value: str | None) -> str | None:
        return value or None


@dataclass(frozen=True)
class TrainingResult:
    """The result of a finished training; everything else is read from the stored model."""

    model_digest: str
    model_uri: str
    mlflow_run_id: str | None
    mlflow_model_version: str | None
    resumed_from: int | None
    """Optimizer step of the checkpoint it continued from."""


_EPOCHS_ALL_RECORDED = 20
_EPOCH_INTERVAL_SECONDS = 1.0


@dataclass
class TrainingMessages:
    """The trainer's custom Pipes messages: epochs become observations while the job runs.

    The first epochs are all recorded. After those, at most one a second, because each takes Dagster milliseconds of a
    processor that a local training shares. Call `close` at the end: the last epoch is always recorded.
    """

    context: StepContext
    clock: Callable[[], float] = time.monotonic
    _num_recorded: int = 0
    _recorded_at: float = 0.0
    _epoch: Mapping[str, Any] | None = None
    """The newest epoch, while it is not recorded."""
    _result: TrainingResult | None = None

    def handle(self, message: Any) -> None:
        """Handle the next message. Unknown types are ignored."""
        match message:
            case {"type": "epoch", **metrics}:
                self._epoch = metrics
                is_due = self.clock() - self._recorded_at >= _EPOCH_INTERVAL_SECONDS
                if self._num_recorded < _EPOCHS_ALL_RECORDED or is_due:
                    self.close()
            case {"type": "result", **values}:
                known: dict[str, Any] = {each.name: values.get(each.name) for each in fields(TrainingResult)}
                self._result = TrainingResult(**known)

    def close(self) -> None:
        """Record the newest epoch, unless it is recorded already."""
        if self._epoch is None:
            return
        metrics, self._epoch = self._epoch, None
        if not self.context.has_assets_def:  # an op; the trainer's output, which is the step's, has the epochs
            return
        description = f"Epoch {metrics.get('epoch')} of {metrics.get('epochs')}"
        self.context.log_event(dg.AssetObservation(self.context.asset_key, description=description, metadata=metrics))
        self._num_recorded, self._recorded_at = self._num_recorded + 1, self.clock()

    def result(self) -> TrainingResult:
        """The result message. TrainingError if the trainer ended without one."""
        if self._result is None:
            raise TrainingError(
                "The trainer ended without reporting a model. See its log (stdout of this step); "
                "start the same training again to continue from its last checkpoint."
            )
        return self._result


class TrainerResource(dg.ConfigurableResource):
    """Runs one training job from its spec and waits for it."""

    module: str = Field(
        default="cifar_assets.training",
        description="Python module of the trainer; its submodule `launch` starts several processes.",
    )

    @abstractmethod
    def train(
        self,
        context: StepContext,
        spec: TrainingSpec,
        scale: TrainingScale,
        child_environment: Mapping[str, str],
    ) -> TrainingResult:
        """Train to the end and return the result.

        `child_environment` lets the job open the object store. Raises TrainingError with the reason if the job fails;
        canceling the Dagster run ends the job.
        """
