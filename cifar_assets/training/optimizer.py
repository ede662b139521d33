"""Optimizers and learning rates: SGD for all of a network, or Muon for its inner convolutions and SGD for the rest."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from cifar_assets.training.recipes import Recipe

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 3
_MUON_MOMENTUM = 0.6


class Muon(Optimizer):
    """Momentum with a nearly orthogonal update of each filter bank (Jordan et al., 2024, the Muon optimizer).

    Before each step, a bank, which has one filter per output channel, is scaled so that its norm is the
    square root of the number of filters.
    `dtype` is the precision of the orthogonalization, for which bfloat16 is sufficient.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float, dtype: torch.dtype):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] (no closure)
        for group in self.param_groups:
            for bank in group["params"]:
                state = self.state[bank]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(bank)
                buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(bank.grad)
                update = orthogonalize(bank.grad.add(buffer, alpha=group["momentum"]).flatten(1).to(self._dtype))
                bank.mul_(len(bank) ** 0.5 / bank.norm())
                bank.add_(update.to(bank.dtype).view(bank.shape), alpha=-group["lr"])


def orthogonalize(matrix: Tensor) -> Tensor:
    """The matrix with singular values near 1, by Newton-Schulz iterations of fifth order, in the matrix's precision."""
    a, b, c = _COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    result = matrix.T if is_tall else matrix
    result = result / (result.norm() + 1e-7)
    for _ in range(_ITERATIONS):
        gram = result @ result.T
        result = a * result + (b * gram + c * gram @ gram) @ result
    return result.T if is_tall else result


def build_optimizers(network: nn.Module, recipe: Recipe, dtype: torch.dtype) -> list[Optimizer]:
    """The recipe's optimizers. Each group's `initial_lr` is its peak rate.

    Batch norm parameters and biases are a separate group with weight decay only if the recipe says so.
    """
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    matrices = {name: parameter for name, parameter in trained.items() if parameter.ndim > 1}
    vectors = [parameter for parameter in trained.values() if parameter.ndim <= 1]
    optimizers: list[Optimizer] = []
    matrix_rate = vector_rate = recipe.learning_rate
    if recipe.optimizer == "muon":
        # the stem, `conv1` of a ResNet, has few inputs: like the head it trains better with SGD
        banks = [p for name, p in matrices.items() if p.ndim > 2 and not name.startswith("conv1.")]
        matrices = {name: p for name, p in matrices.items() if p.ndim == 2 or name.startswith("conv1.")}
        if banks:  # all may be frozen
            optimizers.append(Muon(banks, recipe.body_rate * recipe.learning_rate, _MUON_MOMENTUM, dtype))
        matrix_rate = recipe.head_learning_rate * recipe.batch_size
        vector_rate = recipe.bias_learning_rate * recipe.batch_size
    groups: list[dict[str, Any]] = [
        {"params": list(matrices.values()), "lr": matrix_rate, "weight_decay": recipe.weight_decay},
        {
            "params": vectors,
            "lr": vector_rate,
            "weight_decay": recipe.weight_decay if recipe.decay_norm_and_bias else 0.0,
        },
    ]
    if recipe.body_rate < 1:
        head = {parameter for name, parameter in trained.items() if name.startswith("fc.")}
        groups = [part for group in groups for part in _split(group, head, recipe.body_rate)]
    optimizers.append(SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum, nesterov=recipe.nesterov))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def _split(group: dict[str, Any], head: Collection[nn.Parameter], body_rate: float) -> Iterator[dict[str, Any]]:
    """The head's part of a group, and the rest with its lower rate."""
    yield {**group, "params": [each for each in group["params"] if each in head]}
    rest = [each for each in group["params"] if each not in head]
    yield {**group, "params": rest, "lr": body_rate * group["lr"]}


def rate_factor(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Learning rate of a step, counted from 0 over the whole training, as a fraction of the peak.

    With warm-up, the rate of the first step is above 0, and that of the last step is just above 0.
    """
    total = recipe.epochs * steps_per_epoch
    if recipe.schedule_interval == "epoch":
        step = step // steps_per_epoch * steps_per_epoch
    warmup = recipe.warmup * total
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / (total - warmup)
    return (1 + math.cos(math.pi * progress)) / 2 if recipe.schedule == "cosine" else 1 - progress
