"""The served model: deployed only if the gate passes this exact version and Dagster materialized and checked it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import dagster as dg
from pydantic import Field

from cifar_assets.assets import metadata
from cifar_assets.assets.binding import data_set_asset
from cifar_assets.assets.common import AccuracyGate, retrying_infrastructure_faults
from cifar_assets.assets.keys import INFERENCE_SERVICE, PROCESSED_DATASET, SERVING_POOL, TRAINED_MODEL, key_of
from cifar_assets.assets.record import materialized_digest, previous_digests, why_unproven
from cifar_assets.checks.data import PROCESSED_CHECKS
from cifar_assets.checks.model import MODEL_CHECKS
from cifar_assets.data_set import DataSet
from cifar_assets.gate import choose_precision, judge
from cifar_assets.model_package import ModelManifest
from cifar_assets.serving.comparison import find_canary_fault
from resources.errors import ConfigError
from resources.inference_service import DeployRequest, InferenceServiceResource
from resources.mlflow.resource import MlflowResource
from resources.object_store import ObjectStore
from resources.object_store.resource import ObjectStoreResource
from resources.verdict import Verdict

MAX_SERVICE_AGE = timedelta(days=30)
"""The UI marks a served model older than this as stale: newer data may exist, or the sensor may be off."""


class InferenceServiceConfig(dg.Config):
    """Which model to serve."""

    model_digest: str | None = Field(
        default=None,
        description="Digest of the model to deploy, to pin a version or to return to an older one. "
        "By default the one that trained_model materialized.",
    )
    rollback: bool = Field(
        default=False,
        description="Deploy the model that was served before the current one. Cannot be combined with model_digest.",
    )

    def resolved_digest(self, data_set: DataSet, context: dg.AssetExecutionContext) -> str:
        if self.rollback and self.model_digest:
            raise ConfigError("rollback and model_digest are both set, but each selects a model. Set only one of them.")
        if self.model_digest:
            return self.model_digest
        if not self.rollback:
            return materialized_digest(context, key_of(data_set, TRAINED_MODEL))
        served = previous_digests(context.instance, key_of(data_set, INFERENCE_SERVICE))
        if len(served) < 2:
            raise ConfigError(
                "There is no earlier deployment to roll back to. Set model_digest to the model to deploy."
            )
        return served[1]


@data_set_asset(
    group="serving",
    kinds={"kserve", "onnx"},
    tags={"layer": "serving"},
    deps=[TRAINED_MODEL],
    pool=lambda data_set: data_set.named(SERVING_POOL),
    automation_condition=dg.AutomationCondition.eager() & dg.AutomationCondition.all_deps_blocking_checks_passed(),
    freshness_policy=dg.FreshnessPolicy.time_window(fail_window=MAX_SERVICE_AGE),
)
def inference_service(
    data_set: DataSet,
    context: dg.AssetExecutionContext,
    config: InferenceServiceConfig,
    object_store: ObjectStoreResource,
    mlflow: MlflowResource,
    serving: InferenceServiceResource,
    gate: AccuracyGate,
) -> dg.MaterializeResult:
    """The model behind the REST endpoint.

    However this asset is materialized, it first judges the exact model it is about to deploy: its stored metrics
    against the current threshold, and its history in Dagster's event log. The event log must contain a materialization
    of this digest by trained_model, a materialization by processed_dataset of the dataset it was trained on, and a pass
    of every blocking check of both. If the model is refused, the service is unchanged.
    """
    with retrying_infrastructure_faults():
        models = object_store.models
        digest = config.resolved_digest(data_set, context)
        manifest, verdict, objections = judge_proven(context.instance, data_set, models, digest, gate)
        decision = metadata.of_verdict(digest, verdict)
        if not verdict.passed:
            _record(context, mlflow, digest, verdict)
            text = f"Not deployed: {verdict.reason}. The previous model is still served."
            raise dg.Failure(f"{text} {_advice(data_set, digest, objections)}", metadata=decision, allow_retries=False)
        precision, reason = choose_precision(models, digest, gate.precision)
        decision |= {"precision": precision, "precision_reason": reason}
        service = serving.deploy(
            DeployRequest(
                model_uri=models.at(digest).uri(),
                model_digest=digest,
                model_version=_version(context, mlflow, digest),
                dagster_run_id=context.run_id,
                dataset_digest=manifest.dataset_digest,
                test_accuracy=verdict.numbers["test_accuracy"],
                accuracy_threshold=verdict.numbers["threshold"],
                options={"precision": precision, "precision_reason": reason},
                find_fault=lambda canary: find_canary_fault(canary, models, object_store.processed, digest),
            )
        )
        _record(context, mlflow, digest, verdict)
        return dg.MaterializeResult(
            data_version=dg.DataVersion(digest),
            metadata={**decision, **metadata.of_service(service, manifest, data_set.name)},
        )


def judge_proven(
    instance: dg.DagsterInstance, data_set: DataSet, models: ObjectStore, digest: str, gate: AccuracyGate
) -> tuple[ModelManifest, Verdict, list[str]]:
    """The gate's verdict on a model, which fails if Dagster's event log does not prove it and its dataset, and why."""
    manifest, verdict = judge(models, digest, gate.threshold, gate.public_keys)
    dataset = key_of(data_set, PROCESSED_DATASET)
    objections = [
        *why_unproven(instance, key_of(data_set, TRAINED_MODEL), digest, MODEL_CHECKS(data_set)),
        *why_unproven(instance, dataset, manifest.dataset_digest, PROCESSED_CHECKS(data_set)),
    ]
    return manifest, verdict.and_no(objections), objections


def _advice(data_set: DataSet, digest: str, objections: list[str]) -> str:
    if not objections:
        return "Train a better model, set model_digest to deploy an older one, or lower the gate's threshold."
    trained = key_of(data_set, TRAINED_MODEL)
    config = {"ops": {trained.to_python_identifier(): {"config": {"model_digest": digest}}}}
    return (
        "If you trust the origin of this stored model, materialize it again and run its checks, without training: "
        f"dg launch --assets {trained.to_user_string()} --config-json '{json.dumps(config)}'. "
        "The checks on a dataset run when processed_dataset is materialized."
    )


def _version(context: dg.AssetExecutionContext, mlflow: MlflowResource, digest: str) -> str:
    """The model's version in MLflow's registry, or the start of its digest if MLflow has none or does not respond."""
    with _without_mlflow(context, "the service reports the digest as its version"):
        if version := mlflow.find_version(digest):
            return str(version.version)
    return digest[:12]


def _record(context: dg.AssetExecutionContext, mlflow: MlflowResource, digest: str, verdict: Verdict) -> None:
    """Record the decision in MLflow, for information only."""
    with _without_mlflow(context, f"the gate's decision is not recorded there ({verdict.reason})"):
        if mlflow.record_decision(digest, verdict, context.run_id) is None:
            raise LookupError(f"model {digest} has no registered version; see the log of its training")


@contextmanager
def _without_mlflow(context: dg.AssetExecutionContext, consequence: str) -> Iterator[None]:
    """Turn errors into warnings: deployments do not depend on MLflow."""
    try:
        yield
    except Exception as error:
        context.log.warning(f"MLflow: {consequence}: {error}")
