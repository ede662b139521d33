"""Learning rate: a pure function of the step."""

import math

from cifar_assets.training.recipes import Recipe


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Rate of a step, counted from 0 over the whole training.

    With warm-up the first step already moves, and the last one ends just above the final rate.
    """
    total = recipe.epochs * steps_per_epoch
    if recipe.schedule_interval == "epoch":
        step = step // steps_per_epoch * steps_per_epoch
    warmup = recipe.warmup * total
    if step < warmup:
        return recipe.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / (total - warmup)
    return recipe.learning_rate * _decay(recipe, progress)


def _decay(recipe: Recipe, progress: float) -> float:
    if recipe.schedule == "constant":
        return 1.0
    falling = (1 + math.cos(math.pi * progress)) / 2 if recipe.schedule == "cosine" else 1 - progress
    return recipe.final_learning_rate + (1 - recipe.final_learning_rate) * falling
