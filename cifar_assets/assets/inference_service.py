"""The served model: deployed only when the gate passes this exact version, which Dagster materialized and checked."""

import json
from dataclasses import replace
from datetime import timedelta

import dagster as dg
from pydantic import Field

from cifar_assets.assets import metadata
from cifar_assets.assets.faults import retrying_infrastructure_faults
from cifar_assets.assets.keys import (
    INFERENCE_SERVICE,
    OWNERS,
    PREFIX,
    PROCESSED_DATASET,
    SERVING_POOL,
    TRAINED_MODEL,
)
from cifar_assets.assets.record import why_unproven
from cifar_assets.assets.upstream import materialized_digest, previous_digests
from cifar_assets.checks.data import PROCESSED_CHECKS
from cifar_assets.checks.model import MODEL_CHECKS
from cifar_assets.gate import judge
from cifar_assets.serving.comparison import find_canary_fault
from resources.errors import ConfigError
from resources.gate import AccuracyGate
from resources.inference_service import DeployRequest, InferenceServiceResource
from resources.mlflow.resource import MlflowResource
from resources.object_store.resource import ObjectStoreResource
from resources.verdict import Verdict

MAX_SERVICE_AGE = timedelta(days=30)
"""A served model older than this is shown as stale: data has moved on, or the sensor is off."""


class InferenceServiceConfig(dg.Config):
    """Which model to serve."""

    model_digest: str | None = Field(
        default=None,
        description="Digest of the model to deploy, for pinning or for going back to an older one. "
        "By default the one trained_model materialized.",
    )
    rollback: bool = Field(
        default=False, description="Deploy the model that was served before the current one. Not with model_digest."
    )

    def resolved_digest(self, context: dg.AssetExecutionContext) -> str:
        if self.rollback and self.model_digest:
            raise ConfigError("Give either rollback or model_digest, not both: they name two models.")
        if self.model_digest:
            return self.model_digest
        if not self.rollback:
            return materialized_digest(context, TRAINED_MODEL)
        served = previous_digests(context.instance, INFERENCE_SERVICE)
        if len(served) < 2:
            raise ConfigError("There is no earlier deployment to roll back to: name one by model_digest.")
        return served[1]


@dg.asset(
    key_prefix=PREFIX,
    group_name="serving",
    kinds={"kserve", "onnx"},
    owners=OWNERS,
    tags={"layer": "serving"},
    deps=[TRAINED_MODEL],
    pool=SERVING_POOL,
    automation_condition=dg.AutomationCondition.eager() & dg.AutomationCondition.all_deps_blocking_checks_passed(),
    freshness_policy=dg.FreshnessPolicy.time_window(fail_window=MAX_SERVICE_AGE),
)
def inference_service(
    context: dg.AssetExecutionContext,
    config: InferenceServiceConfig,
    object_store: ObjectStoreResource,
    mlflow: MlflowResource,
    serving: InferenceServiceResource,
    gate: AccuracyGate,
) -> dg.MaterializeResult:
    """The model behind the REST endpoint.

    However this asset is materialized, it first judges the very model it is about to deploy: its stored metrics against
    the threshold in force now, and Dagster's record. The record must hold a materialization of this digest by
    trained_model, one of the dataset it was trained on by processed_dataset, and a pass of every blocking check of
    both. A refused model leaves the service as it is.
    """
    with retrying_infrastructure_faults():
        digest = config.resolved_digest(context)
        manifest, verdict = judge(object_store.models, digest, gate.threshold)
        objections = [
            *why_unproven(context.instance, TRAINED_MODEL, digest, MODEL_CHECKS),
            *why_unproven(context.instance, PROCESSED_DATASET, manifest.dataset_digest, PROCESSED_CHECKS),
        ]
        verdict = replace(verdict, objections=tuple(objections))
        if not verdict.passed:
            _record(context, mlflow, verdict)
            raise _refusal(verdict)
        service = serving.deploy(
            DeployRequest(
                model_uri=object_store.models.at(digest).uri(),
                model_digest=digest,
                model_version=_version(context, mlflow, digest),
                dagster_run_id=context.run_id,
                dataset_digest=manifest.dataset_digest,
                test_accuracy=verdict.test_accuracy,
                accuracy_threshold=verdict.threshold,
                find_fault=lambda canary: find_canary_fault(
                    canary, object_store.models, object_store.processed, digest
                ),
            )
        )
        _record(context, mlflow, verdict)
        return dg.MaterializeResult(
            data_version=dg.DataVersion(digest), metadata=metadata.of_service(service, manifest, verdict)
        )


def _refusal(verdict: Verdict) -> dg.Failure:
    advice = "Train a better model, deploy an older one by model_digest, or lower the gate's threshold."
    if verdict.objections:
        config = {"ops": {TRAINED_MODEL.to_python_identifier(): {"config": {"model_digest": verdict.model_digest}}}}
        advice = (
            "To materialize this stored model again and run its checks, without training, if you know where it comes "
            f"from: dg launch --assets {TRAINED_MODEL.to_user_string()} --config-json '{json.dumps(config)}'. "
            "The checks of a dataset run when processed_dataset is materialized."
        )
    return dg.Failure(
        f"Not deployed: {verdict.reason}. What was served before is still served. {advice}",
        metadata=metadata.of_verdict(verdict),
        allow_retries=False,
    )


def _version(context: dg.AssetExecutionContext, mlflow: MlflowResource, digest: str) -> str:
    """The model's number in MLflow's registry, or the start of its digest where MLflow cannot tell one."""
    try:
        version = mlflow.find_version(digest)
    except Exception as error:
        context.log.warning(f"MLflow did not answer; the service is named by digest: {error}")
        version = None
    return str(version.version) if version else digest[:12]


def _record(context: dg.AssetExecutionContext, mlflow: MlflowResource, verdict: Verdict) -> None:
    """Tell MLflow the decision. The decision holds without it, so its absence is a warning."""
    try:
        if mlflow.record_decision(verdict, context.run_id) is None:
            context.log.warning(
                f"Model {verdict.model_digest} has no version in MLflow: the gate's decision is not recorded there, "
                "and the alias champion stays where it is. The log of its training says why."
            )
    except Exception as error:
        context.log.warning(f"MLflow did not take the gate's decision ({verdict.reason}): {error}")
