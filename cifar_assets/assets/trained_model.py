"""The trained model, made by a job outside the Dagster process, and its twin, made by the Argo workflow."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import dagster as dg
from pydantic import BaseModel, Field, create_model

from cifar_assets.assets import metadata
from cifar_assets.assets.binding import data_set_asset
from cifar_assets.assets.common import AccuracyGate, retrying_infrastructure_faults
from cifar_assets.assets.keys import PROCESSED_DATASET, TRAINED_MODEL, TRAINING_POOL, key_of
from cifar_assets.assets.record import Made, data_version, find_materialization, materializations, materialized_digest
from cifar_assets.data_set import DataSet, read_data_sets
from cifar_assets.dataset.stores import stores_below
from cifar_assets.gate import check_made_by
from cifar_assets.model_package import ENVIRONMENT_FILE, RECIPE_FILE, is_whole, read_json, read_manifest
from cifar_assets.settings import read_settings
from cifar_assets.training.recipes import RECIPES, Recipe
from cifar_assets.training.spec import Execution, JobSpec, build_spec
from resources.argo import PipelineRequest, PipelineResource
from resources.errors import ConfigError
from resources.mlflow.resource import RUN_METADATA, MlflowResource
from resources.mlflow.target import MlflowTarget
from resources.object_store import ObjectStore
from resources.object_store.resource import ObjectStoreResource
from resources.trainer.interface import TrainerResource, TrainingResult, TrainingScale

JOB_METADATA = "job_identity"
"""Metadata key: digest of everything that determines the weights. `reuse` finds a model by it."""

_KEPT_METADATA = (JOB_METADATA, RUN_METADATA, "model_version", "resumed_from")


def _fields_of(model: type[BaseModel]) -> type[dg.Config]:
    """Config with the model's fields, of any value. Dagster refuses other names before a run, the model bad values."""
    fields = {name: field.description for name, field in model.model_fields.items() if name != "name"}
    optional: Any = {name: (Any, Field(default=None, description=text)) for name, text in fields.items()}
    return create_model(f"{model.__name__}Fields", __base__=dg.Config, **optional)


_RecipeFields, _ExecutionFields = _fields_of(Recipe), _fields_of(Execution)


class TrainingConfig(dg.Config):
    """Which dataset to train on, with which changes to the recipe, in how many processes."""

    overrides: _RecipeFields = Field(  # pyright: ignore[reportInvalidTypeForm]: made above
        default_factory=_RecipeFields, description="Fields of the recipe to override for this run."
    )
    start_from: str | None = Field(
        default=None,
        description="Weights to start from, for a ResNet-18: the digest of a model of any data set, or a safetensors "
        "file with torchvision's names, as a path or s3://BUCKET/KEY. By default those of the data set, if it declares "
        "some and the recipe is its own; empty for random weights.",
    )
    dataset_digest: str | None = Field(
        default=None,
        description="Digest of the processed version; by default the one that processed_dataset materialized.",
    )
    scale: TrainingScale = Field(
        default_factory=TrainingScale, description="Number of processes, and the resources of each replica."
    )
    execution: _ExecutionFields = Field(  # pyright: ignore[reportInvalidTypeForm]
        default_factory=_ExecutionFields, description="How the job runs, without effect on what it learns."
    )


class TrainedModelConfig(TrainingConfig):
    """Which recipe to train with which seed, or which stored model to use."""

    recipe: str | None = Field(
        default=None, description=f"One of {', '.join(sorted(RECIPES))}; by default that of the data set."
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Determines initial weights, order and augmentation.")
    reuse: bool = Field(
        default=False,
        description="Reuse the model that this asset made earlier from the same dataset, recipe, seed and start, "
        "if there is one, instead of training it again to the same bits.",
    )
    model_digest: str | None = Field(
        default=None,
        description="Digest of a stored model to materialize and check again instead of training one; all other "
        "fields are ignored. Use a model that this Dagster instance never materialized only if you trust its origin.",
    )

    def job_spec(
        self, data_set: DataSet, object_store: ObjectStoreResource, dataset_digest: str, mlflow: MlflowTarget | None
    ) -> JobSpec:
        """The job that this config describes. Raises ConfigError naming what is wrong with it."""
        recipe = self.recipe or data_set.recipe
        declared = data_set.start_from if recipe == data_set.recipe else None
        start_from = declared if self.start_from is None else self.start_from or None
        return build_spec(
            object_store.processed,
            object_store.models,
            dataset_digest,
            recipe=recipe,
            start_from=start_from,
            other_models=_models_of_all(object_store) if start_from else (),
            overrides=self.overrides.model_dump(),
            execution=self.execution.model_dump(),
            seed=self.seed,
            mlflow=mlflow,
            data_set=data_set.name,
        )


def _models_of_all(object_store: ObjectStoreResource) -> list[ObjectStore]:
    """The models of each declared data set."""
    root = object_store.root()
    return [stores_below(root, each.folder).models for each in read_data_sets(read_settings())]


@data_set_asset(
    group="training",
    kinds={"pytorch", "mlflow"},
    tags={"layer": "model"},
    deps=[PROCESSED_DATASET],
    pool=lambda _: TRAINING_POOL,
)
def trained_model(
    data_set: DataSet,
    context: dg.AssetExecutionContext,
    config: TrainedModelConfig,
    object_store: ObjectStoreResource,
    mlflow: MlflowResource,
    trainer: TrainerResource,
    gate: AccuracyGate,  # a parameter so that an invalid threshold is rejected before hours of training
) -> dg.MaterializeResult:
    """Weights, ONNX and metrics under the model's digest, made by one training job.

    Epochs appear as observations while the job runs. A job that was stopped continues from its checkpoint when
    the asset is materialized again with the same config.
    """
    with retrying_infrastructure_faults():
        models, key = object_store.models, key_of(data_set, TRAINED_MODEL)
        if digest := config.model_digest:
            result, origin = _stored(models, digest, find_materialization(context.instance, key, digest))
        else:
            dataset_digest = config.dataset_digest or materialized_digest(context, key_of(data_set, PROCESSED_DATASET))
            mlflow.prepare()
            spec = config.job_spec(data_set, object_store, dataset_digest, mlflow.target(context))
            before = _trained_before(context.instance, key, models, spec.identity) if config.reuse else None
            if before:
                result, origin = _stored(models, data_version(before.materialization), before)
            else:
                spec.check_dataset(object_store.processed)
                with mlflow.closing_open_runs(context):
                    result = trainer.train(context, spec, config.scale, object_store.child_environment())
                check_made_by(spec, models, result.model_digest)
                origin = {JOB_METADATA: spec.identity, "origin": "trained by this run"}
        return dg.MaterializeResult(
            data_version=dg.DataVersion(result.model_digest),
            metadata={**metadata.of_model(models, result, mlflow, gate.threshold), **origin},
        )


def _trained_before(instance: dg.DagsterInstance, key: dg.AssetKey, models: ObjectStore, identity: str) -> Made | None:
    """The newest materialization by the same job, if its model is still completely stored.

    Found in Dagster's event log, not in the store: anyone with write access to the bucket could fake a record there.
    """
    made = find_training(materializations(instance, key), identity)
    if made is None:
        return None
    digest = data_version(made.materialization)
    return made if is_whole(models.at(digest), digest) else None


def find_training(trainings: Iterable[Made], identity: str) -> Made | None:
    """The first of these materializations that the job with this identity made."""
    for made in trainings:
        job = made.materialization.metadata.get(JOB_METADATA)
        if job and job.value == identity:
            return made
    return None


def _stored(models: ObjectStore, digest: str, before: Made | None) -> tuple[TrainingResult, metadata.Metadata]:
    """A stored model instead of a training, with the training metadata of its original materialization."""
    result = TrainingResult(digest, models.at(digest).uri(), None, None, None)
    if before is None:
        origin = (
            "named in the config; not materialized before, so whoever started this run is responsible for its origin"
        )
        return result, {"origin": origin}
    kept = {name: value for name, value in before.materialization.metadata.items() if name in _KEPT_METADATA}
    return result, {**kept, "origin": f"materialized before by run {before.run_id}"}


class ArgoTrainedModelConfig(dg.Config):
    """Which training to repeat, and on how many pods."""

    model_digest: str | None = Field(
        default=None,
        description="Model whose dataset, recipe and seed the workflow uses; by default the one that trained_model "
        "materialized.",
    )
    replicas: int = Field(default=1, ge=1, le=64, description="Pods of the workflow's PyTorchJob.")


@data_set_asset(
    group="training",
    kinds={"argo", "pytorch"},
    tags={"layer": "model"},
    deps=[PROCESSED_DATASET, TRAINED_MODEL],
    pool=lambda _: TRAINING_POOL,
    output_required=False,
    dagster_type=dg.Nothing,  # pyright: ignore[reportArgumentType]: typed as None
)
def argo_trained_model(
    data_set: DataSet,
    context: dg.AssetExecutionContext,
    config: ArgoTrainedModelConfig,
    object_store: ObjectStoreResource,
    mlflow: MlflowResource,
    argo: PipelineResource,
    gate: AccuracyGate,
) -> Iterator[dg.MaterializeResult]:
    """The model that the workflow in k8s/argo makes from the same dataset, recipe and seed as cifar10/trained_model.

    Nothing depends on it, and only the job argo_parity or a run of this asset alone trains it: a run of more assets,
    such as "Materialize all", leaves it out. A model below the threshold is materialized too: its checks compare the
    two pipelines, including their verdicts.
    """
    if set(context.run.asset_selection or ()) - {context.asset_key}:
        context.log.info("Left out of a run of several assets. To train it: dg launch --job argo_parity")
        return
    with retrying_infrastructure_faults():
        models = object_store.models
        twin = config.model_digest or materialized_digest(context, key_of(data_set, TRAINED_MODEL))
        result = argo.run(context, _repeated(models, twin, config.replicas, gate))
        digest = result.training.model_digest
        yield dg.MaterializeResult(
            data_version=dg.DataVersion(digest),
            metadata={
                **metadata.of_model(models, result.training, mlflow, result.verdict.numbers["threshold"]),
                **metadata.of_verdict(digest, result.verdict),
                "pipeline_run": result.run,
                "repeats": twin,
            },
        )


def _repeated(models: ObjectStore, digest: str, replicas: int, gate: AccuracyGate) -> PipelineRequest:
    """The training that made a model, requested again with the same number of threads, which affects rounding."""
    package = models.at(digest)
    manifest = read_manifest(package, digest)
    if manifest.start_weights:
        raise ConfigError(
            f"Model {digest} started from other weights, but the Argo workflow starts from random ones: set "
            "model_digest to a model that did."
        )
    recipe = read_json(package, manifest, RECIPE_FILE)
    execution = {}
    if package.exists(ENVIRONMENT_FILE):
        environment = json.loads(package.read(ENVIRONMENT_FILE))
        device = "cpu" if environment["device"] == "cpu" else "cuda"
        execution = {"threads": environment["threads"], "device": device}
    return PipelineRequest(
        dataset_digest=manifest.dataset_digest,
        recipe=str(recipe.pop("name")),
        overrides=recipe,
        execution=execution,
        seed=manifest.seed,
        replicas=replicas,
        threshold=gate.threshold,
    )
