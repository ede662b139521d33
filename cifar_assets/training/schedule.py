"""Learning rate and image size: pure functions of the step."""

import math

from cifar_assets.training.recipes import Recipe


def rate_factor(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Learning rate of a step, counted from 0 over the whole training, as a fraction of the peak.

    With warm-up the first step already moves, and the last one ends just above the final rate.
    """
    total = recipe.epochs * steps_per_epoch
    if recipe.schedule_interval == "epoch":
        step = step // steps_per_epoch * steps_per_epoch
    warmup = recipe.warmup * total
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / (total - warmup)
    return _decay(recipe, progress)


def resolution(recipe: Recipe, step: int, steps_per_epoch: int) -> int:
    """Image size in pixels at a step, counted from 0 over the whole training."""
    progress = step / (recipe.epochs * steps_per_epoch)
    return next(phase.size for phase in reversed(recipe.resolutions) if progress >= phase.start)


def _decay(recipe: Recipe, progress: float) -> float:
    if recipe.schedule == "constant":
        return 1.0
    falling = (1 + math.cos(math.pi * progress)) / 2 if recipe.schedule == "cosine" else 1 - progress
    return recipe.final_learning_rate + (1 - recipe.final_learning_rate) * falling
