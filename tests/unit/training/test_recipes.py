import subprocess
import sys

import pytest
from pydantic import BaseModel

from cifar_assets.training.recipes import DEFAULT_RECIPE, RECIPES, Recipe, ResolutionPhase, get_recipe
from cifar_assets.training.spec import Execution, JobSpec
from resources.errors import ConfigError
from resources.mlflow.target import MlflowTarget


@pytest.mark.parametrize("model", [Recipe, ResolutionPhase, JobSpec, Execution, MlflowTarget])
def test_every_field_says_what_it_is(model: type[BaseModel]) -> None:
    undescribed = [name for name, field in model.model_fields.items() if not field.description]
    assert undescribed == []


def test_the_recipes_are_found_under_their_names() -> None:
    assert {"baseline", "resnet18", "fast", DEFAULT_RECIPE} <= set(RECIPES)
    assert all(recipe.name == name for name, recipe in RECIPES.items())


def test_baseline_is_the_configuration_of_the_pipeline_it_comes_from() -> None:
    baseline = get_recipe("baseline")
    assert (baseline.network, baseline.epochs, baseline.batch_size) == ("resnet18", 10, 32)
    assert (baseline.learning_rate, baseline.weight_decay) == (0.01, 5e-4)
    assert (baseline.momentum, baseline.nesterov) == (0.9, False)
    assert (baseline.schedule, baseline.schedule_interval, baseline.warmup) == ("cosine", "epoch", 0)
    assert (baseline.flip, baseline.translate, baseline.padding, baseline.cutout) == ("random", 4, "zero", 0)
    assert (baseline.precision, baseline.label_smoothing, baseline.views) == ("float32", 0, "plain")
    assert baseline.optimizer == "sgd"
    assert baseline.decay_norm_and_bias
    assert baseline.resolutions == (ResolutionPhase(start=0),)


def test_the_earlier_name_of_baseline_still_works(caplog: pytest.LogCaptureFixture) -> None:
    assert get_recipe("seed", {"epochs": 2}) == get_recipe("baseline", {"epochs": 2})
    assert "'seed' is now called 'baseline'" in caplog.text


def test_one_field_is_overridden_and_the_rest_stays() -> None:
    recipe = get_recipe("resnet18", {"epochs": 3, "resolutions": [{"start": 0, "size": 24}]})
    assert recipe.epochs == 3
    assert recipe.resolutions == (ResolutionPhase(start=0, size=24),)
    assert recipe.learning_rate == RECIPES["resnet18"].learning_rate


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"epoch": 3}, "epoch"),
        ({"epochs": 0}, "epochs"),
        ({"learning_rate": -1}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": float("inf")}, "learning_rate"),
        ({"learning_rate": 1e39}, "learning_rate"),
        ({"batch_size": 1}, "batch_size"),
        ({"network": "vgg"}, "network"),
        ({"momentum": 1.0}, "momentum"),
        ({"schedule": "linear"}, "schedule"),
        ({"resolutions": []}, "resolutions"),
        ({"resolutions": [{"start": 0.5, "size": 32}]}, "resolutions"),
        ({"resolutions": [{"start": 0, "size": 16}, {"start": 0, "size": 32}]}, "resolutions"),
        ({"resolutions": [{"start": 0, "size": 7}]}, "size"),
        ({"precision": "float16"}, "precision"),
    ],
)
def test_a_wrong_override_is_refused_by_name(overrides: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        get_recipe("resnet18", overrides)


@pytest.mark.parametrize(
    ("recipe", "overrides", "named"),
    [
        ("resnet18", {"resolutions": [{"start": 0, "size": 17}]}, "images of 16 pixels: lower resolutions"),
        ("resnet18", {"cutout": 17, "translate": 16}, "lower cutout, translate"),
        ("fast", {}, "resolutions"),
        ("fast", {"resolutions": [{"start": 0, "size": 8}]}, "a speednet needs at least 9"),
    ],
)
def test_a_recipe_for_larger_images_is_refused_by_field(recipe: str, overrides: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        get_recipe(recipe, overrides).check_fits(16)


def test_an_unknown_recipe_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"'resnet50'.*baseline.*best.*fast.*resnet18"):
        get_recipe("resnet50")


def test_building_a_spec_loads_no_torch() -> None:
    code = "import sys, cifar_assets.training.spec; print(sorted({'torch', 'mlflow', 'dagster'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
