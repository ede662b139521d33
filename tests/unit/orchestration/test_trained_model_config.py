"""The training asset's config: every field of a recipe can be changed, and nothing else."""

from collections.abc import Callable
from pathlib import Path

import dagster as dg
import pytest
from pydantic import ValidationError

from cifar_assets.assets.trained_model import TrainedModelConfig
from cifar_assets.data_set import DataSet
from cifar_assets.definitions import defs
from cifar_assets.training.recipes import DEFAULT_RECIPE, Recipe
from cifar_assets.training.spec import Execution, JobSpec
from resources.errors import ConfigError
from resources.object_store.resource import LocalObjectStore
from resources.trainer.interface import TrainingScale
from tests.fixtures.cifar10 import DATA_SET
from tests.fixtures.tiny_data import store_manifest
from tests.unit.training.test_start import WIDTH, store_resnet

CHANGED = {
    "network": "speednet",
    "width": 8,
    "widening": 2,
    "depth": 3,
    "epochs": 3,
    "batch_size": 17,
    "resolutions": [{"start": 0.0, "size": 16.0}, {"start": 0.5, "size": 32.0}],
    "optimizer": "sgd",
    "learning_rate": 0.123,
    "head_learning_rate": 0.0123,
    "bias_learning_rate": 0.0321,
    "schedule": "cosine",
    "schedule_interval": "epoch",
    "warmup": 0.31,
    "momentum": 0.81,
    "nesterov": False,
    "weight_decay": 0.0123,
    "decay_norm_and_bias": True,
    "label_smoothing": 0.07,
    "flip": "none",
    "translate": 3,
    "padding": "zero",
    "cutout": 9,
    "batch_norm_momentum": 0.33,
    "precision": "float32",
    "views": "mirrored",
    "validate_every": 3,
}

OF_A_RESNET = {"freeze": 2, "body_rate": 0.3}
"""Fields that need weights to start from."""

SpecOf = Callable[[dict], JobSpec]


@pytest.fixture
def object_store(tmp_path: Path) -> LocalObjectStore:
    return LocalObjectStore(path=str(tmp_path))


@pytest.fixture
def spec_of(object_store: LocalObjectStore) -> SpecOf:
    dataset = store_manifest(object_store.processed)
    return lambda config: TrainedModelConfig(**config).job_spec(DATA_SET, object_store, dataset, None)


def test_every_field_of_a_recipe_can_be_overridden(spec_of: SpecOf) -> None:
    fields = set(Recipe.model_fields) - {"name"}
    assert CHANGED.keys() | OF_A_RESNET.keys() == fields, "add the new field above with a changed value"
    recipe = spec_of({"overrides": CHANGED}).recipe.model_dump(mode="json")
    for name, value in CHANGED.items():
        assert recipe[name] == value, name


def test_a_model_of_another_data_set_is_the_start(object_store: LocalObjectStore, monkeypatch) -> None:
    monkeypatch.setenv("DATA_SETS", "[{name: flowers, source: x}]")
    dataset = store_manifest(object_store.processed)
    digest = store_resnet(object_store.model_copy(update={"folder": "flowers"}).models)

    def start_of(data_set: DataSet, **config: object) -> str | None:
        given = {"overrides": {"width": WIDTH, **OF_A_RESNET}, **config}
        spec = TrainedModelConfig(**given).job_spec(data_set, object_store, dataset, None)
        assert (spec.recipe.freeze, spec.recipe.body_rate) == (2, 0.3)
        return spec.start and spec.start.model_digest

    assert start_of(DATA_SET, recipe="finetune", start_from=digest) == digest
    declared = DATA_SET.model_copy(update={"recipe": "finetune", "start_from": digest})
    assert start_of(declared) == digest
    with pytest.raises(ConfigError, match="set start_from"):
        start_of(declared, recipe="resnet18")


def test_every_field_of_the_execution_can_be_set(spec_of: SpecOf) -> None:
    changed = {
        "device": "cpu",
        "threads": 3,
        "resident_megabytes": 7,
        "checkpoint_every_steps": 11,
        "keep_checkpoints": 5,
    }
    assert set(changed) == set(Execution.model_fields)
    assert spec_of({"execution": changed}).execution == Execution.model_validate(changed)


def test_without_config_the_default_recipe_is_complete(spec_of: SpecOf) -> None:
    spec = spec_of({})
    assert spec.recipe.name == DEFAULT_RECIPE
    assert spec.dataset_uri.endswith(f"processed-data/{spec.dataset_digest}/")
    assert spec.output_uri.endswith("/models/")


@pytest.mark.parametrize("left_out", [{"overrides": {"epochs": None}}, {"execution": {"threads": None}}])
def test_null_means_left_out(spec_of: SpecOf, left_out: dict) -> None:
    assert spec_of(left_out) == spec_of({})


def test_job_and_copies_for_the_old_pipeline_are_those_of_the_data_set(object_store: LocalObjectStore) -> None:
    dataset = store_manifest(object_store.processed)
    flowers = DATA_SET.model_copy(update={"name": "flowers"})
    first, second = (TrainedModelConfig().job_spec(each, object_store, dataset, None) for each in (DATA_SET, flowers))
    assert (first.name, first.write_baseline_copies) == ("cifar10-fast", True)
    assert (second.name, second.write_baseline_copies) == ("flowers-fast", False)
    assert first.identity == second.identity


def test_empty_quantity_means_left_out() -> None:
    assert TrainingScale(cpu="", memory="") == TrainingScale()


def test_dataset_of_smaller_images_is_refused_before_training(object_store: LocalObjectStore) -> None:
    dataset = store_manifest(object_store.processed, image_size=10)
    with pytest.raises(ConfigError, match="for images of 10 pixels, a speednet needs at least 9"):
        TrainedModelConfig().job_spec(DATA_SET, object_store, dataset, None).check_dataset(object_store.processed)


def test_cutout_larger_than_the_images_is_refused_before_training(spec_of: SpecOf) -> None:
    with pytest.raises(ConfigError, match="cutout"):
        spec_of({"overrides": {"cutout": 33}})


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"recipe": "resnet50"}, "baseline.*fast.*resnet18"),
        ({"overrides": {"epochs": 0}}, "epochs"),
        ({"overrides": {"epochs": "many"}}, "epochs"),
        ({"overrides": {"network": "vgg"}}, "network"),
        ({"overrides": {"resolutions": [{"start": 0.5, "size": 16}]}}, "resolutions"),
        ({"execution": {"threads": 0}}, "threads"),
        ({"execution": {"device": "tpu"}}, "device"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_naming_the_field(spec_of: SpecOf, config: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        spec_of(config)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"recipe_name": "fast"}, "recipe_name"),
        ({"overrides": {"lerning_rate": 1.0}}, r'"lerning_rate" at path .*overrides\. Expected.* learning_rate'),
        ({"overrides": {"name": "mine"}}, '"name" at path .*overrides'),
        ({"execution": {"thread": 1}}, r'"thread" at path .*execution\. Expected.* threads'),
        ({"seed": "many"}, "seed"),
    ],
)
def test_the_launchpad_refuses_what_it_does_not_know(config: dict, named: str) -> None:
    with pytest.raises(dg.DagsterInvalidConfigError, match=named):
        dg.validate_run_config(defs.resolve_job_def("train"), {"ops": {"cifar10__trained_model": {"config": config}}})


@pytest.mark.parametrize("config", [{"scale": {"replicas": 0}}, {"seed": -1}, {"seed": 2**32}])
def test_impossible_values_are_refused(config: dict) -> None:
    with pytest.raises(ValidationError, match=r"replicas|seed"):
        TrainedModelConfig(**config)
