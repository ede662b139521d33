import subprocess
import sys

import pytest
from pydantic import BaseModel

from cifar_assets.contracts import ImageSpec
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
    ("recipe", "overrides", "size", "named"),
    [
        ("fast", {"resolutions": [{"start": 0, "size": 16}]}, 16, "at 8 pixels; .* a speednet needs at least 9"),
        ("fast", {"resolutions": [{"start": 0, "size": 8}]}, 64, "at 16 pixels; .* a speednet needs at least 17"),
    ],
)
def test_recipe_for_larger_images_is_refused(recipe: str, overrides: dict, size: int, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        get_recipe(recipe, overrides).check_fits(ImageSpec(classes=("a", "b"), image_size=size))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_fits_every_size(recipe: str) -> None:
    for size in range(16, 225):
        get_recipe(recipe).check_fits(ImageSpec(classes=("a", "b"), image_size=size))


@pytest.mark.parametrize(("classes", "images", "named"), [(("a",), 9, "at least two"), (("a", "b", "c"), 2, "only 2")])
def test_dataset_that_cannot_be_learned_is_refused(classes: tuple[str, ...], images: int, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        get_recipe("fast").check_fits(ImageSpec(classes=classes), images)


@pytest.mark.parametrize(
    ("images", "given", "expected"),
    [
        (45_000, {}, (500, 5)),
        (5_000, {}, (500, 5)),
        (4_000, {}, (500, 25)),
        (240, {}, (32, 25)),
        (240, {"epochs": 2}, (32, 2)),
        (240, {"batch_size": 100}, (100, 67)),
        (20, {}, (32, 200)),
    ],
)
def test_recipe_takes_enough_steps_on_few_images(images: int, given: dict, expected: tuple[int, int]) -> None:
    recipe = get_recipe("fast", given).fitted(images, given)
    assert (recipe.batch_size, recipe.epochs) == expected


@pytest.mark.parametrize(("size", "expected"), [(16, 12), (28, 20), (32, 24), (64, 48), (96, 72), (224, 168)])
def test_resolutions_scale_with_the_images(size: int, expected: int) -> None:
    first, last = get_recipe("fast").resolutions
    assert (first.size_of(size), last.size_of(size)) == (expected, size)


def test_an_unknown_recipe_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"'resnet50'.*baseline.*best.*fast.*resnet18"):
        get_recipe("resnet50")


def test_building_a_spec_loads_no_torch() -> None:
    code = "import sys, cifar_assets.training.spec; print(sorted({'torch', 'mlflow', 'dagster'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
