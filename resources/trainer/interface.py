"""What every way of running a training has in common: its scale, its result, and the messages it sends meanwhile."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import dagster as dg
from pydantic import Field

from resources.errors import TrainingError
from resources.trainer.contract import TrainingSpec


class TrainingScale(dg.Config):
    """How many processes train, and what each replica is given. A field left out is the trainer's own setting.

    The local trainer heeds the numbers of processes; its own are 1.
    """

    replicas: int | None = Field(default=None, ge=1, le=64, description="Pods: one master, the others workers.")
    nproc_per_node: int | None = Field(default=None, ge=1, le=64, description="Training processes in each replica.")
    cpu: str | None = Field(default=None, description="CPU of each replica, such as '2'.")
    memory: str | None = Field(default=None, description="Memory of each replica, such as '4Gi'.")
    gpu: int | None = Field(default=None, ge=0, le=16, description="GPUs of each replica.")


@dataclass(frozen=True)
class TrainingResult:
    """What a finished training says of itself; everything else is read from the stored model."""

    model_digest: str
    model_uri: str
    mlflow_run_id: str | None
    mlflow_model_version: str | None
    resumed_from: int | None
    """Optimizer step of the checkpoint it continued from."""


class TrainingMessages:
    """The trainer's custom Pipes messages: each epoch becomes an observation while the job runs."""

    def __init__(self, context: dg.AssetExecutionContext):
        self._context = context
        self._num_handled = 0
        self._result: TrainingResult | None = None

    def handle_new(self, messages: Sequence[Any]) -> None:
        """Handle those of all messages so far that were not handled before."""
        for message in messages[self._num_handled :]:
            self.handle(message)
        self._num_handled = len(messages)

    def handle(self, message: Any) -> None:
        """Handle the next message. One of no known type is ignored."""
        match message:
            case {"type": "epoch", **metrics}:
                description = f"Epoch {metrics.get('epoch')} of {metrics.get('epochs')}"
                self._context.log_event(
                    dg.AssetObservation(self._context.asset_key, description=description, metadata=metrics)
                )
            case {"type": "result", **values}:
                known: dict[str, Any] = {each.name: values.get(each.name) for each in fields(TrainingResult)}
                self._result = TrainingResult(**known)

    def result(self) -> TrainingResult:
        """The final message. TrainingError when the trainer ended without one."""
        if self._result is None:
            raise TrainingError(
                "The trainer ended without reporting a model. Its log (stdout of this step) has the reason; "
                "materialize trained_model again to continue from its last checkpoint."
            )
        return self._result


class TrainerResource(dg.ConfigurableResource):
    """Runs one training job from its spec and waits for it."""

    module: str = Field(
        default="cifar_assets.training",
        description="Python module that trains; its submodule `launch` starts several processes that train together.",
    )

    @abstractmethod
    def train(
        self,
        context: dg.AssetExecutionContext,
        spec: TrainingSpec,
        scale: TrainingScale,
        child_environment: Mapping[str, str],
    ) -> TrainingResult:
        """Train to the end and return the result.

        `child_environment` lets the job open the object store. Raises TrainingError with the reason when the job fails;
        cancelling the Dagster run ends the job.
        """
