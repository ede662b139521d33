"""Training as a PyTorchJob: the same spec, command and messages as the local trainer's process."""

import json
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import dagster as dg
from pydantic import Field, ValidationError

from resources.errors import ConfigError
from resources.kubernetes.collector import CollectorTarget
from resources.kubernetes.diagnosis import WatchLimits
from resources.kubernetes.steps import as_dagster_failure
from resources.object_store.resource import ObjectStoreResource
from resources.object_store.s3_settings import CREDENTIALS
from resources.pytorch_job.client import PipesPyTorchJobClient, PyTorchJobClient, build_pytorch_job_collector
from resources.pytorch_job.config import PyTorchJobConfig
from resources.trainer.contract import EXIT_BAD_SPEC, JOB_SPEC_VARIABLE, PIPES_PREFIX, TrainingSpec
from resources.trainer.interface import TrainerResource, TrainingMessages, TrainingResult, TrainingScale


class KubernetesTrainer(TrainerResource):
    """Runs the trainer image as a PyTorchJob and relays its messages.

    A failed job is dg.Failure with cause, exit code and log tails as metadata; it allows a retry only if the cause is
    outside the training.
    """

    object_store: dg.ResourceDependency[ObjectStoreResource]
    job: PyTorchJobConfig = Field(description="Settings of all jobs; the asset's config may change their scale.")
    namespace: str = Field(description="Namespace of the jobs.")
    kubeconfig_file: str | None = Field(default=None, description="By default the service account or KUBECONFIG.")
    store_endpoint_url: str | None = Field(
        default=None, description="Address of the object store for pods, if it differs."
    )
    mlflow_tracking_uri: str | None = Field(default=None, description="Address of MLflow for pods, if it differs.")
    unschedulable_timeout_seconds: float = Field(
        default=600.0, gt=0, description="How long a pod may wait for a node with enough resources."
    )
    blocked_timeout_seconds: float = Field(
        default=180.0, gt=0, description="How long to wait for an image that cannot be pulled, or a missing Secret."
    )
    start_timeout_seconds: float = Field(
        default=1800.0, gt=0, description="How long a pod may take to start if there is no error."
    )

    def train(
        self,
        context: dg.AssetExecutionContext,
        spec: TrainingSpec,
        scale: TrainingScale,
        child_environment: Mapping[str, str],
    ) -> TrainingResult:
        messages = TrainingMessages(context)

        def on_message(payload: Any, replayed: bool) -> None:
            # An epoch that this Dagster run has already recorded is not observed again; the result always counts.
            if not (replayed and isinstance(payload, Mapping) and payload.get("type") == "epoch"):
                messages.handle(payload)

        config = self.job_config(spec, scale, child_environment)
        with closing(messages), as_dagster_failure():
            self.pipes_client().run(
                context=context,
                config=config,
                name_prefix=spec.name,
                work=json.dumps([spec.identity, config.replicas, config.nproc_per_node, config.image]),
                on_message=on_message,
            )
        return messages.result()

    def job_config(
        self, spec: TrainingSpec, scale: TrainingScale, child_environment: Mapping[str, str]
    ) -> PyTorchJobConfig:
        """Settings of one training's job. ConfigError if the pods would have no credentials for the store."""
        env = {name: value for name, value in child_environment.items() if name not in CREDENTIALS}
        if len(env) < len(child_environment) and not self.job.env_secrets:
            raise ConfigError(
                "The trainer's job has no Secret with the object store's credentials: list it in job.env_secrets, "
                f"with the keys {' and '.join(CREDENTIALS[:2])}. They are never written into a manifest."
            )
        if self.store_endpoint_url:
            env["AWS_ENDPOINT_URL"] = self.store_endpoint_url
        env[JOB_SPEC_VARIABLE] = self._spec_for_pods(spec).model_dump_json()
        settings = self.job.model_dump() | scale.model_dump(exclude_none=True)
        settings["env"] = {**self.job.env, **env}
        if settings["nproc_per_node"] > 1 and not self.job.command:
            # the operator sets what torchrun needs to know in PET_... variables
            settings["command"] = ["python", "-m", f"{self.module}.launch"]
        try:
            return PyTorchJobConfig(**settings)
        except ValidationError as error:
            raise ConfigError(f"The scale of trained_model is not valid for a job: {error}") from error

    def pipes_client(self) -> PipesPyTorchJobClient:
        return PipesPyTorchJobClient(
            message_store=self.object_store.models.at(PIPES_PREFIX),
            client=self.connect(),
            namespace=self.namespace,
            limits=self.limits(),
        )

    def limits(self) -> WatchLimits:
        """How long to wait, and the exit codes after which another attempt may help: EXIT_RESUME and SIGKILL's."""
        return WatchLimits(
            unschedulable_timeout_seconds=self.unschedulable_timeout_seconds,
            blocked_timeout_seconds=self.blocked_timeout_seconds,
            start_timeout_seconds=self.start_timeout_seconds,
            final_exit_codes=(EXIT_BAD_SPEC,),
            retry_other_exit_codes=False,
        )

    def connect(self) -> PyTorchJobClient:
        """Client of the cluster's API. SettingsError when no cluster is configured."""
        return PyTorchJobClient.production(self.kubeconfig_file)

    def collector_target(self) -> CollectorTarget:
        """The job client and message store for the collector sensor."""
        return CollectorTarget(self.connect(), self.namespace, self.object_store.models.at(PIPES_PREFIX))

    def _spec_for_pods(self, spec: TrainingSpec) -> TrainingSpec:
        if spec.mlflow is None or self.mlflow_tracking_uri is None:
            return spec
        target = spec.mlflow.model_copy(update={"tracking_uri": self.mlflow_tracking_uri})
        return spec.model_copy(update={"mlflow": target})


def build_trainer_collector(resource_key: str = "trainer") -> dg.SensorDefinition:
    """The sensor that cleans up jobs and messages of the KubernetesTrainer with this resource key."""

    def target(context: dg.SensorEvaluationContext) -> CollectorTarget:
        return getattr(context.resources, resource_key).collector_target()

    return build_pytorch_job_collector(target, required_resource_keys={resource_key})
