"""Training as a PyTorchJob or a TrainJob: the same spec, command and messages as the local trainer's process."""

import json
import time
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import dagster as dg
from pydantic import Field, ValidationError

from resources.errors import ConfigError
from resources.interrupts import sleep
from resources.kubernetes.collector import CollectorTarget, build_job_collector
from resources.kubernetes.diagnosis import Outage, WatchLimits
from resources.kubernetes.errors import ApiUnavailableError, SettingsError
from resources.kubernetes.job import JobClient
from resources.kubernetes.pipes import PipesJobClient
from resources.kubernetes.steps import as_dagster_failure
from resources.object_store.resource import ObjectStoreResource
from resources.object_store.s3_settings import CREDENTIALS
from resources.pytorch_job.client import PipesPyTorchJobClient
from resources.pytorch_job.config import PyTorchJobConfig
from resources.step_context import StepContext
from resources.train_job.client import PipesTrainJobClient
from resources.train_job.config import TrainJobConfig
from resources.trainer.contract import EXIT_BAD_SPEC, JOB_SPEC_VARIABLE, PIPES_PREFIX, TrainingSpec
from resources.trainer.interface import TrainerResource, TrainingMessages, TrainingResult, TrainingScale

TrainingJobConfig = PyTorchJobConfig | TrainJobConfig

_KINDS: Mapping[str, type[PipesJobClient[Any]]] = {
    "pytorch_job": PipesPyTorchJobClient,
    "train_job": PipesTrainJobClient,
}
"""Each kind's field with its settings, and its client. The first kind that the cluster has is used."""


class KubernetesTrainer(TrainerResource):
    """Runs the trainer image as a PyTorchJob or a TrainJob and relays its messages.

    If both have settings, the kind that the cluster has is used, PyTorchJob first. A failed job is dg.Failure with
    cause, exit code and log tails as metadata; it allows a retry only if the cause is outside the training.
    """

    object_store: dg.ResourceDependency[ObjectStoreResource]
    pytorch_job: PyTorchJobConfig | None = Field(
        default=None, description="Settings of all PyTorchJobs; the asset's config may change their scale."
    )
    train_job: TrainJobConfig | None = Field(default=None, description="Settings of all TrainJobs, likewise.")
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
        context: StepContext,
        spec: TrainingSpec,
        scale: TrainingScale,
        child_environment: Mapping[str, str],
    ) -> TrainingResult:
        messages = TrainingMessages(context)

        def on_message(payload: Any, replayed: bool) -> None:
            # An epoch that this Dagster run has already recorded is not observed again; the result always counts.
            if not (replayed and isinstance(payload, Mapping) and payload.get("type") == "epoch"):
                messages.handle(payload)

        with closing(messages), as_dagster_failure():
            kind = self._kind_after_outage(context)
            config = self.job_config(kind, spec, scale, child_environment)
            done = self.pipes_client(kind).run(
                context=context,
                config=config,
                name_prefix=spec.name,
                work=json.dumps([spec.identity, config.replicas, config.nproc_per_node, config.image]),
                on_message=on_message,
            )
        context.add_output_metadata({name: value for name, value in done.metadata.items() if "_queue_" in name})
        return messages.result()

    def kind(self) -> str:
        """Field of the kind to use. SettingsError if the cluster has none of the kinds with settings."""
        kinds = [kind for kind in _KINDS if getattr(self, kind)]
        found = kinds if len(kinds) == 1 else [kind for kind in kinds if self.connect(kind).is_installed()]
        if not found:
            operators = " or ".join(_KINDS[kind].client_class.operator for kind in kinds or _KINDS)
            raise SettingsError(f"The cluster has no kind of job for trainings: install {operators} and its CRDs.")
        return found[0]

    def _kind_after_outage(self, context: StepContext) -> str:
        limits = self.limits()
        outage = Outage(
            time.monotonic, limits.outage_timeout_seconds, logger=context.log, meanwhile="the training waits to start"
        )
        while True:
            try:
                kind = self.kind()
            except ApiUnavailableError as error:
                outage.endure(error)
                sleep(limits.poll_interval_seconds)
                continue
            client: Any = _KINDS[kind].client_class
            context.log.info("Training as a %s.", client.resource.kind)
            return kind

    def job_config(
        self, kind: str, spec: TrainingSpec, scale: TrainingScale, child_environment: Mapping[str, str]
    ) -> TrainingJobConfig:
        """Settings of one training's job. ConfigError if the pods would have no credentials for the store."""
        job: TrainingJobConfig = getattr(self, kind)
        env = {name: value for name, value in child_environment.items() if name not in CREDENTIALS}
        if len(env) < len(child_environment) and not _may_open_store(job):
            raise ConfigError(
                "The trainer's job has no Secret with the object store's credentials: list it in env_secrets of a "
                "PyTorchJob, or in the TrainingRuntime of a TrainJob, with the keys "
                f"{' and '.join(CREDENTIALS[:2])}. They are never written into a manifest."
            )
        if self.store_endpoint_url:
            env["AWS_ENDPOINT_URL"] = self.store_endpoint_url
        env[JOB_SPEC_VARIABLE] = self._spec_for_pods(spec).model_dump_json()
        settings = job.model_dump() | scale.model_dump(exclude_none=True)
        settings["env"] = {**job.env, **env}
        # Both operators set torchrun's PET_... variables. Only the training operator also sets RANK and WORLD_SIZE, for
        # a single process in each pod.
        several = settings["nproc_per_node"] > 1 or (settings["replicas"] > 1 and isinstance(job, TrainJobConfig))
        if several and not job.command:
            settings["command"] = ["python", "-m", f"{self.module}.launch"]
        try:
            return type(job)(**settings)
        except ValidationError as error:
            raise ConfigError(f"The scale of trained_model is not valid for a job: {error}") from error

    def pipes_client(self, kind: str) -> PipesJobClient[Any]:
        return _KINDS[kind](
            message_store=self.object_store.models.at(PIPES_PREFIX),
            client=self.connect(kind),
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

    def connect(self, kind: str) -> JobClient[Any]:
        """Client of the cluster's API. SettingsError when no cluster is configured."""
        return _KINDS[kind].client_class.production(self.kubeconfig_file)

    def collector_target(self) -> CollectorTarget:
        """The job client and message store for the collector sensor."""
        return CollectorTarget(self.connect(self.kind()), self.namespace, self.object_store.models.at(PIPES_PREFIX))

    def _spec_for_pods(self, spec: TrainingSpec) -> TrainingSpec:
        if spec.mlflow is None or self.mlflow_tracking_uri is None:
            return spec
        target = spec.mlflow.model_copy(update={"tracking_uri": self.mlflow_tracking_uri})
        return spec.model_copy(update={"mlflow": target})


def _may_open_store(job: TrainingJobConfig) -> bool:
    """Whether the job's Secrets, or a runtime in its namespace, can contain the store's credentials."""
    if isinstance(job, TrainJobConfig):
        return job.runtime_kind == "TrainingRuntime" or set(CREDENTIALS[:2]) <= job.secret_env.keys()
    return bool(job.env_secrets)


def build_trainer_collector() -> dg.SensorDefinition:
    """The sensor that cleans up jobs and messages of the KubernetesTrainer, whose resource key is `trainer`."""
    return build_job_collector(
        "trainer_collector",
        lambda context: context.resources.trainer.collector_target(),
        required_resource_keys={"trainer"},
    )
