"""The last trained model once more, by the Argo workflow: for those who want to see both roads lead to the same."""

import json
from typing import Any

import dagster as dg
from pydantic import Field

from cifar_assets.assets import metadata
from cifar_assets.assets.faults import retrying_infrastructure_faults
from cifar_assets.assets.keys import OWNERS, PREFIX, PROCESSED_DATASET, TRAINED_MODEL, TRAINING_POOL
from cifar_assets.assets.upstream import materialized_digest
from cifar_assets.model_package import ENVIRONMENT_FILE, RECIPE_FILE, read_json, read_manifest
from resources.argo import PipelineRequest, PipelineResource
from resources.gate import AccuracyGate
from resources.mlflow.resource import MlflowResource
from resources.object_store import ObjectStore
from resources.object_store.resource import ObjectStoreResource


class ArgoTrainedModelConfig(dg.Config):
    """Which training to repeat, on how many pods."""

    model_digest: str | None = Field(
        default=None,
        description="Model whose dataset, recipe and seed the workflow is given; by default the one trained_model "
        "materialized.",
    )
    replicas: int = Field(default=1, ge=1, le=64, description="Pods of the workflow's PyTorchJob.")


@dg.asset(
    key_prefix=PREFIX,
    group_name="training",
    kinds={"argo", "pytorch"},
    owners=OWNERS,
    tags={"layer": "model"},
    deps=[PROCESSED_DATASET, TRAINED_MODEL],
    pool=TRAINING_POOL,
)
def argo_trained_model(
    context: dg.AssetExecutionContext,
    config: ArgoTrainedModelConfig,
    object_store: ObjectStoreResource,
    mlflow: MlflowResource,
    argo: PipelineResource,
    gate: AccuracyGate,
) -> dg.MaterializeResult:
    """The model that the workflow of k8s/argo makes of the same dataset, recipe and seed as cifar10/trained_model.

    Nothing depends on it, and no job starts it but argo_parity. A model below the threshold is materialized
    too: its checks compare the two roads, verdict included.
    """
    with retrying_infrastructure_faults():
        twin = config.model_digest or materialized_digest(context, TRAINED_MODEL)
        result = argo.run(context, _request(object_store.models, twin, config.replicas, gate.threshold))
        return dg.MaterializeResult(
            data_version=dg.DataVersion(result.verdict.model_digest),
            metadata={
                **metadata.of_model(object_store.models, result.training, mlflow, gate.threshold),
                **metadata.of_verdict(result.verdict),
                "pipeline_run": result.run,
                "repeats": twin,
            },
        )


def _request(models: ObjectStore, digest: str, replicas: int, threshold: float) -> PipelineRequest:
    """The training that made a model, asked for again, with as many threads: their number decides rounding."""
    package = models.at(digest)
    manifest = read_manifest(package, digest)
    recipe = read_json(package, manifest, RECIPE_FILE)
    name = str(recipe.pop("name"))
    return PipelineRequest(
        dataset_digest=manifest.dataset_digest,
        recipe=name,
        overrides=recipe,
        execution=_execution(package),
        seed=manifest.seed,
        replicas=replicas,
        threshold=threshold,
    )


def _execution(package: ObjectStore) -> dict[str, Any]:
    if not package.exists(ENVIRONMENT_FILE):
        return {}
    environment = json.loads(package.read(ENVIRONMENT_FILE))
    device = "cpu" if environment["device"] == "cpu" else "cuda"
    return {"threads": environment["threads"], "device": device}
