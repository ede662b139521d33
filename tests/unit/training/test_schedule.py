import itertools
import math

import pytest

from cifar_assets.training.data import resolution
from cifar_assets.training.optimizer import rate_factor
from cifar_assets.training.recipes import Recipe, get_recipe


def rates(recipe: Recipe, steps: int) -> list[float]:
    return [recipe.learning_rate * rate_factor(recipe, step, steps) for step in range(recipe.epochs * steps)]


def test_cosine_by_epoch_is_the_one_of_torch() -> None:
    recipe = get_recipe("baseline")
    by_epoch = rates(recipe, 3)[::3]
    assert by_epoch == pytest.approx([0.01 * (1 + math.cos(math.pi * epoch / 10)) / 2 for epoch in range(10)])
    assert rates(recipe, 3)[1] == rates(recipe, 3)[0]


def test_a_triangle_rises_to_the_peak_and_falls_in_a_straight_line() -> None:
    recipe = get_recipe("resnet18", {"epochs": 5, "learning_rate": 1.0, "warmup": 0.4, "schedule": "triangle"})
    found = rates(recipe, 2)
    assert found[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert found[4] == 1.0
    falls = [before - after for before, after in itertools.pairwise(found[4:])]
    assert falls == pytest.approx([1 / 6] * 5)
    assert 0 < found[-1] < 0.2


@pytest.mark.parametrize(("epochs", "steps"), [(4, 10), (1, 40), (10, 4)])
def test_resolution_phases_keep_their_fraction_of_the_steps(epochs: int, steps: int) -> None:
    phases = [{"start": 0, "size": 16}, {"start": 0.5, "size": 24}, {"start": 0.75}]
    recipe = get_recipe("resnet18", {"epochs": epochs, "resolutions": phases})
    assert [resolution(recipe, step, steps, 32) for step in range(40)] == [16] * 20 + [24] * 10 + [32] * 10
