"""What every way of running a training has in common: its scale, its result, and the messages it sends meanwhile."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dagster as dg
from pydantic import Field

from resources.errors import TrainingError
from resources.trainer.contract import TrainingSpec


class TrainingScale(dg.Config):
    """How many processes train, and what each replica is given."""

    replicas: int = Field(default=1, ge=1, le=64, description="Pods of the job: one master, the others workers.")
    nproc_per_node: int = Field(default=1, ge=1, le=64, description="Training processes in each replica.")
    cpu: str | None = Field(
        default=None, description="CPU of each replica, such as '2'. Not used by the local trainer."
    )
    memory: str | None = Field(
        default=None, description="Memory of each replica, such as '4Gi'. Not used by the local trainer."
    )
    gpu: int = Field(default=0, ge=0, le=16, description="GPUs of each replica. Not used by the local trainer.")

    @property
    def num_processes(self) -> int:
        return self.replicas * self.nproc_per_node


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
    """Relays the trainer's custom Pipes messages: each epoch becomes an observation while the job runs."""

    def __init__(self, context: dg.AssetExecutionContext):
        self._context = context
        self._num_seen = 0
        self._result: Mapping[str, Any] | None = None

    def relay(self, messages: Sequence[Any]) -> None:
        """Handle those of the session's messages that were not handled before. Call it repeatedly."""
        for message in messages[self._num_seen :]:
            self._num_seen += 1
            kind = message.get("type") if isinstance(message, Mapping) else None
            if kind == "epoch":
                self._observe_epoch(message)
            elif kind == "result":
                self._result = message

    def result(self) -> TrainingResult:
        """The final message. TrainingError when the trainer ended without one."""
        if self._result is None:
            raise TrainingError(
                "The trainer ended without reporting a model. Its log (stdout of this step) has the reason; "
                "materialize trained_model again to continue from its last checkpoint."
            )
        return TrainingResult(
            model_digest=self._result["model_digest"],
            model_uri=self._result["model_uri"],
            mlflow_run_id=self._result.get("mlflow_run_id"),
            mlflow_model_version=self._result.get("mlflow_model_version"),
            resumed_from=self._result.get("resumed_from"),
        )

    def _observe_epoch(self, message: Mapping[str, Any]) -> None:
        metadata = {name: value for name, value in message.items() if name != "type"}
        self._context.log_event(
            dg.AssetObservation(
                asset_key=self._context.asset_key,
                description=f"Epoch {message.get('epoch')} of {message.get('epochs')}",
                metadata=metadata,
            )
        )


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
