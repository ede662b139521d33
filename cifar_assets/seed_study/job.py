"""The job `seed_study`: each partition is a recipe and a seed. It serves nothing and registers nothing."""

from typing import Any

import dagster as dg

from cifar_assets.assets.binding import bind
from cifar_assets.assets.common import retrying_infrastructure_faults
from cifar_assets.assets.keys import PROCESSED_DATASET, SEED_STUDY, TRAINING_POOL, key_of
from cifar_assets.assets.record import DATA_VERSION_TAG, Made, materializations, materialized_digest
from cifar_assets.assets.trained_model import JOB_METADATA, TrainedModelConfig, TrainingConfig, find_training
from cifar_assets.data_set import DataSet
from cifar_assets.gate import check_made_by, number, read_metrics
from cifar_assets.training.recipes import RECIPES
from cifar_assets.training.spec import JobSpec
from resources.mlflow.resource import RUN_METADATA, MlflowResource
from resources.object_store.resource import ObjectStoreResource
from resources.trainer.interface import TrainerResource

NUM_SEEDS = 10
ACCURACY = "test_accuracy"
"""Metadata key."""


def partition_of(recipe: str, seed: int) -> str:
    """The partition's key."""
    return f"{recipe}-{seed}"


PARTITIONS = dg.StaticPartitionsDefinition(
    [partition_of(recipe, seed) for recipe in sorted(RECIPES) for seed in range(NUM_SEEDS)]
)


def spec_of(
    data_set: DataSet, config: TrainingConfig, object_store: ObjectStoreResource, dataset: str, partition: str
) -> JobSpec:
    """The training of a partition, without MLflow. Raises ConfigError as `job_spec`."""
    recipe, _, seed = partition.rpartition("-")
    fields: dict[str, Any] = {**dict(config), "recipe": recipe, "seed": int(seed)}
    return TrainedModelConfig(**fields).job_spec(data_set, object_store, dataset, None)


def find_trained(instance: dg.DagsterInstance, data_set: DataSet, spec: JobSpec) -> Made | None:
    """The training of this spec, if the job did it earlier."""
    return find_training(materializations(instance, key_of(data_set, SEED_STUDY), limit=None), spec.identity)


def train_seed(
    data_set: DataSet,
    context: dg.OpExecutionContext,
    config: TrainingConfig,
    object_store: ObjectStoreResource,
    mlflow: MlflowResource,
    trainer: TrainerResource,
) -> None:
    """Train the partition's model and record its accuracy, unless that is recorded already."""
    with retrying_infrastructure_faults():
        dataset = config.dataset_digest or materialized_digest(context, key_of(data_set, PROCESSED_DATASET))
        spec = spec_of(data_set, config, object_store, dataset, context.partition_key)
        if before := find_trained(context.instance, data_set, spec):
            context.log.info(f"Trained before, by run {before.run_id}.")
            return
        study = spec.model_copy(update={"seed": 0}).identity  # the same for trainings that differ only in the seed
        mlflow.prepare()
        target = mlflow.target(context)
        target = target.model_copy(update={"registered_model": None, "tags": {**target.tags, SEED_STUDY: study}})
        with mlflow.closing_open_runs(context):
            result = trainer.train(
                context,
                spec.model_copy(update={"mlflow": target, "write_baseline_copies": False}),
                config.scale,
                object_store.child_environment(),
            )
        check_made_by(spec, object_store.models, result.model_digest)
        metrics = read_metrics(object_store.models, result.model_digest)
        context.log_event(
            dg.AssetMaterialization(
                key_of(data_set, SEED_STUDY),
                partition=context.partition_key,
                tags={DATA_VERSION_TAG: result.model_digest},
                metadata={
                    ACCURACY: number(metrics, ACCURACY),
                    "model_digest": result.model_digest,
                    "dataset_digest": dataset,
                    SEED_STUDY: study,
                    JOB_METADATA: spec.identity,
                    RUN_METADATA: mlflow.run_link(result.mlflow_run_id),
                },
            )
        )


def build_seed_study(data_set: DataSet) -> dg.JobDefinition:
    """A data set's job."""
    op = dg.op(name=data_set.named("train_seed"), description="Trains a recipe with one seed.", pool=TRAINING_POOL)(
        bind(train_seed, data_set)
    )

    @dg.job(
        name=data_set.named(SEED_STUDY),
        partitions_def=PARTITIONS,
        description="Trains a recipe with several seeds, one in each partition, to compare their accuracies. Deploys "
        "nothing. `python -m cifar_assets.seed_study` starts the runs and prints mean and standard deviation.",
    )
    def seed_study() -> None:
        op()

    return seed_study
