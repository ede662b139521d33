"""Everything a training changes as it goes: what a checkpoint holds."""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cifar_assets.training.finite import first_not_finite
from cifar_assets.training.optimizer import build_optimizers
from cifar_assets.training.recipes import Recipe
from resources.errors import DataError

_POSITION_VERSION = 1


@dataclass
class EpochRecord:
    """What one finished epoch came to. Losses and accuracy are repeatable; seconds and images/s are not.

    Epochs that are not validated have no validation loss and accuracy. The learning rate is that of the last step.
    """

    epoch: int
    train_loss: float
    validation_loss: float | None
    validation_accuracy: float | None
    learning_rate: float
    resolution: int
    seconds: float
    images_per_second: float


@dataclass
class Position:
    """Where a training stands: the next step is `step` of epoch `epoch`, both counted from 0."""

    epoch: int = 0
    step: int = 0
    epoch_seconds: float = 0.0
    history: list[EpochRecord] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"version": _POSITION_VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Position":
        """The position that `to_json` gave; without a version it is of the first form. DataError for anything else."""
        if (version := value.get("version", _POSITION_VERSION)) != _POSITION_VERSION:
            raise DataError(f"Its position has version {version}, expected {_POSITION_VERSION}: train again.")
        try:
            history = [EpochRecord(**record) for record in value["history"]]
            return cls(value["epoch"], value["step"], value["epoch_seconds"], history)
        except (KeyError, TypeError) as error:
            raise DataError(f"There is no position in it: {error!r}.") from error


class TrainingState:
    """Network, optimizer, moving average and position of one training.

    Args:
        network: the network being trained, on its device.
        recipe: decides optimizers and whether there is a moving average.
        dtype: of the processor's matrix products.
    """

    def __init__(self, network: nn.Module, recipe: Recipe, dtype: torch.dtype):
        self.network = network
        self.optimizers = build_optimizers(network, recipe, dtype)
        self.position = Position()
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=next(network.parameters()).device)
        self._recipe = recipe
        self._average = _copy_tensors(network) if recipe.ema_decay else None

    def update_average(self, global_step: int) -> None:
        """Move the average towards the weights, after the step of this number, counted from 1 over the training.

        The decay grows from 0, so that the average forgets the initial weights.
        """
        if self._average is None or global_step % self._recipe.ema_every:
            return
        updates = global_step // self._recipe.ema_every
        decay = min(self._recipe.ema_decay**self._recipe.ema_every, 1 - 1 / (updates + 1))
        with torch.no_grad():
            for name, value in self.network.state_dict().items():
                if value.is_floating_point():
                    self._average[name].lerp_(value, 1 - decay)
                else:
                    self._average[name].copy_(value)

    def published_tensors(self) -> dict[str, Tensor]:
        """State dict of the network that is evaluated and published: the moving average where there is one."""
        return self._average if self._average is not None else dict(self.network.state_dict())

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor a continuation needs, by name."""
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in (self._average or {}).items()}
        for name, optimizer, parameter in self._momenta():
            momentum = optimizer.state[parameter].get("momentum_buffer")
            if momentum is not None:
                tensors[name] = momentum
        tensors["loss_sum"] = self.loss_sum
        tensors["torch_random"] = torch.get_rng_state()
        return tensors

    def load(self, tensors: dict[str, Tensor], position: Position) -> None:
        """Continue from these. Raises DataError, with nothing changed, when they do not fit the recipe."""
        wanted = self.tensors()
        wanted |= {name: parameter for name, _, parameter in self._momenta()}
        unfit = sorted(name for name in wanted.keys() | tensors.keys() if _form(wanted, name) != _form(tensors, name))
        if (name := first_not_finite(tensors)) is not None:
            raise DataError(f"{name} holds numbers that are not finite.")
        if unfit:
            raise DataError(f"{len(unfit)} tensors are missing, unknown or of another shape or type: {unfit[:3]}.")
        prefix = "network."
        self.network.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        for name, value in (self._average or {}).items():
            value.copy_(tensors[f"average.{name}"])
        for name, optimizer, parameter in self._momenta():
            buffer = torch.empty_like(parameter, requires_grad=False).copy_(tensors[name])
            optimizer.state[parameter]["momentum_buffer"] = buffer
        self.loss_sum.copy_(tensors["loss_sum"])
        torch.set_rng_state(tensors["torch_random"])
        self.position = position

    def _momenta(self) -> list[tuple[str, Optimizer, nn.Parameter]]:
        """Every parameter that has a momentum, with the momentum's name in a checkpoint."""
        owners = [(o, p) for o in self.optimizers for g in o.param_groups if g["momentum"] for p in g["params"]]
        return [(f"momentum.{index}", optimizer, parameter) for index, (optimizer, parameter) in enumerate(owners)]


def _form(tensors: dict[str, Tensor], name: str) -> object:
    return (tensors[name].shape, tensors[name].dtype) if name in tensors else None


def _copy_tensors(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}
