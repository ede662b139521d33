"""The mutable state of a training, and its checkpoints in the object store.

A checkpoint is one object, written atomically, named by its step and digest, and verified when read.
"""

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.optim import Optimizer

from cifar_assets.training.optimizer import build_optimizers
from cifar_assets.training.recipes import Recipe
from resources.digests import sha256_bytes
from resources.errors import DataError, ObjectNotFoundError
from resources.object_store import ObjectStore

_LOG = logging.getLogger(__name__)
_NAME = re.compile(r"step-\d{9}-[0-9a-f]{64}\.safetensors")
_METADATA_KEY = "checkpoint"


class EpochRecord(BaseModel):
    """Result of one finished epoch. Losses and accuracy are reproducible; seconds and images/s are not.

    Epochs without validation have no validation loss and accuracy. The learning rate is that of the last step.
    """

    epoch: int
    train_loss: float
    validation_loss: float | None
    validation_accuracy: float | None
    learning_rate: float
    resolution: int
    seconds: float
    images_per_second: float


class Position(BaseModel):
    """Position of a training: the next step is `step` of epoch `epoch`, both counted from 0."""

    version: Literal[1] = 1
    epoch: int = 0
    step: int = 0
    epoch_seconds: float = 0.0
    history: list[EpochRecord] = []
    made_with: dict[str, Any] = {}
    """Settings that affect rounding and that the spec does not fix."""


class TrainingState:
    """Network, optimizers and position of one training; `dtype` is that of the processor's matrix products."""

    def __init__(self, network: nn.Module, recipe: Recipe, dtype: torch.dtype):
        self.network = network
        self.optimizers = build_optimizers(network, recipe, dtype)
        self.position = Position()
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=next(network.parameters()).device)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors needed to continue, by name."""
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        momenta = {name: optimizer.state[p].get("momentum_buffer") for name, optimizer, p in self._momenta()}
        tensors |= {name: momentum for name, momentum in momenta.items() if momentum is not None}
        return {**tensors, "loss_sum": self.loss_sum, "torch_random": torch.get_rng_state()}

    def load(self, tensors: dict[str, Tensor], position: Position) -> None:
        """Restore these tensors. Raises DataError, without changing anything, when they do not fit the recipe."""
        if (name := first_not_finite(tensors)) is not None:
            raise DataError(f"{name} contains numbers that are not finite.")
        expected = self.tensors() | {name: parameter for name, _, parameter in self._momenta()}
        forms, wanted = ({(n, t.shape, t.dtype) for n, t in each.items()} for each in (tensors, expected))
        if unfit := sorted({name for name, _, _ in forms ^ wanted}):
            raise DataError(f"{len(unfit)} tensors are missing, unknown or of another shape or type: {unfit[:3]}.")
        prefix = "network."
        self.network.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        for name, optimizer, parameter in self._momenta():
            buffer = torch.empty_like(parameter, requires_grad=False).copy_(tensors[name])
            optimizer.state[parameter]["momentum_buffer"] = buffer
        self.loss_sum.copy_(tensors["loss_sum"])
        torch.set_rng_state(tensors["torch_random"])
        self.position = position

    def _momenta(self) -> list[tuple[str, Optimizer, nn.Parameter]]:
        """The parameters with momentum, and the momentum's name in a checkpoint."""
        owners = [(o, p) for o in self.optimizers for g in o.param_groups if g["momentum"] for p in g["params"]]
        return [(f"momentum.{index}", optimizer, parameter) for index, (optimizer, parameter) in enumerate(owners)]


def first_not_finite(tensors: dict[str, Tensor]) -> str | None:
    """Name of the first tensor with an infinity or NaN, if there is one."""
    return next((name for name, value in tensors.items() if not bool(torch.isfinite(value).all())), None)


@dataclass(frozen=True)
class Checkpoint:
    """A training's tensors and position after `step` optimizer steps."""

    step: int
    tensors: dict[str, Tensor]
    position: Position


@dataclass(frozen=True)
class CheckpointStore:
    """Checkpoints of one training job, in a store rooted at the job's folder. The newest `keep` are kept."""

    store: ObjectStore
    keep: int

    def save(self, step: int, tensors: dict[str, Tensor], position: Position) -> None:
        data = save(
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
            metadata={_METADATA_KEY: position.model_dump_json()},
        )
        key = f"step-{step:09d}-{sha256_bytes(data)}.safetensors"
        self.store.write(key, data)
        for old in self._keys()[self.keep :]:
            if old != key:
                self.store.delete(old)

    def load_newest(self, use: Callable[[Checkpoint], None] = lambda checkpoint: None) -> Checkpoint | None:
        """The newest intact checkpoint that `use` accepted, or None. `use` raises DataError for one that does not fit.

        A damaged or unfit checkpoint is logged, removed and skipped.
        """
        for key in self._keys():
            try:
                checkpoint = self._load(key)
                use(checkpoint)
                return checkpoint
            except (DataError, ObjectNotFoundError) as error:
                _LOG.warning("Skipping checkpoint %s: %s", self.store.uri(key), error)
                self.store.delete(key)
        return None

    def load_step(self, step: int) -> Checkpoint:
        """The checkpoint after this number of steps. Raises ObjectNotFoundError without it, DataError if damaged."""
        for key in self._keys():
            if key.startswith(f"step-{step:09d}-"):
                return self._load(key)
        raise ObjectNotFoundError(f"{self.store.uri()}: no checkpoint of step {step}.")

    def clear(self) -> None:
        """Remove every checkpoint of the job."""
        for key in self._keys():
            self.store.delete(key)

    def _keys(self) -> list[str]:
        """Keys of checkpoints, newest first."""
        keys = [info.key for info in self.store.list() if _NAME.fullmatch(info.key)]
        return sorted(keys, reverse=True)

    def _load(self, key: str) -> Checkpoint:
        _, step, digest = key.removesuffix(".safetensors").split("-")
        data = self.store.read_verified(key, digest)
        try:
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            position = Position.model_validate_json(header["__metadata__"][_METADATA_KEY])
            return Checkpoint(int(step), load(data), position)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{key} is not a checkpoint of this project: {error}") from error
