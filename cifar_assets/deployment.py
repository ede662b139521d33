"""Chooses the graph's resources: the only module that knows which deployment this is. Opens no connection."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import dagster as dg
from pydantic import BaseModel, ValidationError

from cifar_assets.assets.common import AccuracyGate
from cifar_assets.data_set import DataSet, default_data_set, read_data_sets
from cifar_assets.serving.settings import ENVIRONMENT_PREFIX
from cifar_assets.settings import Settings
from resources.errors import ConfigError
from resources.model_signature import SIGNING_KEY_VARIABLE
from resources.object_store import TRAFFIC_BUCKET
from resources.object_store.resource import LocalObjectStore, ObjectStoreResource, object_store_from_environment
from resources.run_liveness import watched_executor

if TYPE_CHECKING:
    from resources.inference_service.kserve.resource import KServeInferenceService
    from resources.trainer.kubernetes import KubernetesTrainer

_Model = TypeVar("_Model", bound=BaseModel)
_JOB_DEFAULTS: Mapping[str, Any] = {
    "service_account_name": "trainer",
    "scratch": "4Gi",
    "secret_env": {SIGNING_KEY_VARIABLE: {"secret": "model-signing", "key": "private.pem", "optional": True}},
}
_KIND_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "pytorchjob": {"env_secrets": ["object-store-trainer"], "run_policy": {"backoff_limit": 3}},
    "trainjob": {"runtime": "cifar-trainer", "runtime_kind": "TrainingRuntime"},
}

_NOT_SHARED = frozenset(f"{ENVIRONMENT_PREFIX}{name}" for name in ("RECORD_URI", "MODEL_NAME"))
"""Of `env` in SERVER_SETTINGS, what counts for the default data set only: others would mix with it."""


def resources_for(settings: Settings, data_sets: Sequence[DataSet] = ()) -> dict[str, Any]:
    """Resources by key, some of them for each data set. ConfigError names the invalid environment variable."""
    is_local = settings.dagster_deployment == "local"
    shared, own = (_local_shared, _local) if is_local else (_kubernetes_shared, _kubernetes)
    resources = shared(settings)
    for data_set in data_sets or read_data_sets(settings):
        gate = AccuracyGate(
            threshold=data_set.threshold, precision=settings.serving_precision, public_keys=settings.model_public_key
        )
        for name, resource in {**own(settings, data_set), "gate": gate}.items():
            resources[data_set.named(name)] = resource
    return resources


def executor_for(settings: Settings) -> dg.ExecutorDefinition:
    """How steps run: in the run's process on a laptop, each in a separate process elsewhere.

    The steps form a chain and training is a separate process anyway, so more processes only add startup time.
    """
    return watched_executor if settings.dagster_deployment == "local" else dg.multiprocess_executor


def sensors_for(settings: Settings) -> list[dg.SensorDefinition]:
    """Sensors that only this deployment needs: in a cluster, the one that cleans up after dead runs."""
    if settings.dagster_deployment == "local":
        return []
    from resources.trainer.kubernetes import build_trainer_collector

    return [build_trainer_collector()]


def _local_shared(_: Settings) -> dict[str, Any]:
    from resources.argo.local import LocalPipeline
    from resources.trainer.local import LocalTrainer

    return {"trainer": LocalTrainer(), "argo": LocalPipeline()}


def _local(settings: Settings, data_set: DataSet) -> dict[str, Any]:
    from resources.inference_service import LocalInferenceService
    from resources.mlflow.resource import LocalMlflow

    object_store = LocalObjectStore(folder=data_set.folder)
    state_dir = Path(LocalInferenceService.model_fields["state_dir"].default) / data_set.folder
    return {
        "object_store": object_store,
        "mlflow": LocalMlflow(experiment=data_set.name, registered_model=data_set.name),
        "serving": LocalInferenceService(
            server_module="cifar_assets.serving",
            withheld_prefixes=[ENVIRONMENT_PREFIX, SIGNING_KEY_VARIABLE],
            state_dir=str(state_dir),
            port=data_set.port or settings.inference_service_port,
            options=_options(settings, data_set, object_store.traffic.uri(), record_interval="5", feedback="true"),
        ),
    }


def _kubernetes_shared(settings: Settings) -> dict[str, Any]:
    from resources.argo.resource import ArgoPipeline

    images = {"trainer-image": settings.trainer_image}
    parameters = {name: str(value) for name, value in {**images, **settings.argo_parameters}.items()}
    return {
        "trainer": trainer_for(settings, object_store_from_environment(os.environ)),
        "argo": ArgoPipeline(namespace=settings.trainer_namespace, parameters=parameters),
    }


def _kubernetes(settings: Settings, data_set: DataSet) -> dict[str, Any]:
    from resources.mlflow.resource import MlflowServer

    return {
        "object_store": object_store_from_environment(os.environ, data_set.folder),
        "mlflow": MlflowServer(
            # if it is missing, the resource raises its own error when it is used
            tracking_uri=dg.EnvVar("MLFLOW_TRACKING_URI") if settings.mlflow_tracking_uri else "",
            experiment=data_set.name,
            registered_model=data_set.name,
        ),
        "serving": serving_for(settings, data_set),
    }


def trainer_for(settings: Settings, object_store: ObjectStoreResource) -> "KubernetesTrainer":
    """The trainer of a cluster, for the kind of job in TRAINER_KIND or each kind for which TRAINER_JOB is valid."""
    from resources.pytorch_job.config import PyTorchJobConfig
    from resources.train_job.config import TrainJobConfig
    from resources.trainer.kubernetes import KubernetesTrainer

    models = {"pytorchjob": PyTorchJobConfig, "trainjob": TrainJobConfig}
    jobs: dict[str, Any] = {}
    problems = []
    for kind in [settings.trainer_kind] if settings.trainer_kind else models:
        fields = {**_JOB_DEFAULTS, **_KIND_DEFAULTS[kind], **settings.trainer_job, "image": settings.trainer_image}
        try:
            jobs[kind] = _build(models[kind], "TRAINER_JOB", fields)
        except ConfigError as error:
            problems.append(error)
    if not jobs:
        raise ConfigError(" ".join(dict.fromkeys(map(str, problems))))
    return KubernetesTrainer(
        object_store=object_store,
        pytorch_job=jobs.get("pytorchjob"),
        train_job=jobs.get("trainjob"),
        namespace=settings.trainer_namespace,
        store_endpoint_url=settings.trainer_store_endpoint_url,
        mlflow_tracking_uri=settings.trainer_mlflow_tracking_uri,
    )


def serving_for(settings: Settings, data_set: DataSet | None = None) -> "KServeInferenceService":
    """The service of a data set, by default CIFAR-10, in a cluster."""
    from resources.inference_service.kserve.config import InferenceServiceSettings
    from resources.inference_service.kserve.resource import KServeInferenceService

    data_set = data_set or default_data_set(settings)
    bucket = f"{os.environ.get('CIFAR_BUCKET_PREFIX', '')}{TRAFFIC_BUCKET}"
    options = _options(settings, data_set, f"s3://{bucket}/{data_set.folder}").items()
    env = {f"{ENVIRONMENT_PREFIX}{name.upper()}": value for name, value in options}
    service = {**settings.server_settings, "image": settings.server_image}
    if isinstance(own := service.get("env", {}), dict):  # anything else is refused below
        kept = {name: value for name, value in own.items() if data_set.is_default or name not in _NOT_SHARED}
        service["env"] = {**env, **kept}
    fields = {
        "settings": _build(InferenceServiceSettings, "SERVER_SETTINGS", service),
        "namespace": settings.server_namespace,
        "name": data_set.service or settings.server_name,
        "base_url": data_set.url,
        "host": settings.server_host if data_set.is_default else None,
        "gateway": settings.server_gateway,
        "shadow_seconds": settings.server_shadow_seconds,
    }
    names = "SERVER_SETTINGS, SERVER_NAME, SERVER_NAMESPACE, SERVER_HOST, SERVER_GATEWAY, SERVER_SHADOW_SECONDS"
    return _build(KServeInferenceService, f"{names} or a service of DATA_SETS", fields)


def _options(settings: Settings, data_set: DataSet, uri: str, **recording: str) -> dict[str, str]:
    """Options of the model server: the model's name, and where traffic is recorded, unless that is off."""
    name = {} if data_set.is_default else {"model_name": data_set.name}
    fraction = settings.recorded_fraction
    return {**name, "record_uri": uri, "record_fraction": f"{fraction:g}", **recording} if fraction else name


def _build(kind: type[_Model], variable: str, fields: Mapping[str, Any]) -> _Model:
    """The object with these fields. ConfigError does not show their values."""
    try:
        return kind(**fields)
    except ValidationError as error:
        found = [
            (".".join(map(str, each["loc"])), each["msg"].removeprefix("Value error, ")) for each in error.errors()
        ]
        problems = "; ".join(": ".join(filter(None, parts)) for parts in found)
        raise ConfigError(f"{variable} is not valid for {kind.__name__}. {problems}") from None
