"""Which resources stand behind the graph: the one place that knows of deployments."""

import os
from collections.abc import Mapping
from typing import Any

import dagster as dg

from resources.errors import ConfigError
from resources.gate import DEFAULT_THRESHOLD, AccuracyGate
from resources.run_liveness import watched

DEPLOYMENT_VARIABLE = "DAGSTER_DEPLOYMENT"
THRESHOLD_VARIABLE = "ACCURACY_THRESHOLD"
SERVICE_PORT_VARIABLE = "INFERENCE_SERVICE_PORT"


def resources_for(environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Resources by key for the deployment that DAGSTER_DEPLOYMENT names. Opens no connection.

    Raises ConfigError for an unknown deployment or a threshold that is not a fraction.
    """
    deployed = _local(environment) if _name(environment) == "local" else _kubernetes(environment)
    return {**deployed, "gate": _gate(environment)}


def executor_for(environment: Mapping[str, str] = os.environ) -> dg.ExecutorDefinition:
    """How steps run: one after the other in the run's process on a laptop, each in a process of its own elsewhere.

    The steps are one chain and the heavy one runs apart in any case, so on a laptop more processes only cost start-up.
    """
    return watched(dg.in_process_executor if _name(environment) == "local" else dg.multiprocess_executor)


def sensors_for(environment: Mapping[str, str] = os.environ) -> list[dg.SensorDefinition]:
    """Sensors that only this deployment needs: in a cluster, the one that collects what dead runs left behind."""
    if _name(environment) == "local":
        return []
    from resources.trainer.kubernetes import build_trainer_collector

    return [build_trainer_collector()]


def _name(environment: Mapping[str, str]) -> str:
    name = environment.get(DEPLOYMENT_VARIABLE, "local")
    if name not in ("local", "kubernetes"):
        raise ConfigError(f"{DEPLOYMENT_VARIABLE} is {name!r}: expected 'local' or 'kubernetes'.")
    return name


def _gate(environment: Mapping[str, str]) -> AccuracyGate:
    text = environment.get(THRESHOLD_VARIABLE)
    try:
        return AccuracyGate(threshold=DEFAULT_THRESHOLD if text is None else float(text))
    except ValueError as error:
        raise ConfigError(
            f"{THRESHOLD_VARIABLE} is {text!r}: expected a fraction from 0 to 1 with a decimal point, such as 0.8."
        ) from error


def _local(environment: Mapping[str, str]) -> dict[str, Any]:
    from cifar_assets.serving.settings import ENVIRONMENT_PREFIX
    from resources.argo.local import LocalPipeline
    from resources.inference_service import LocalInferenceService
    from resources.mlflow.resource import LocalMlflow
    from resources.object_store.resource import LocalObjectStore
    from resources.trainer.local import LocalTrainer

    return {
        "object_store": LocalObjectStore(),
        "mlflow": LocalMlflow(),
        "trainer": LocalTrainer(),
        "serving": LocalInferenceService(
            server_module="cifar_assets.serving", withheld_prefix=ENVIRONMENT_PREFIX, port=_port(environment)
        ),
        "argo": LocalPipeline(),
    }


def _port(environment: Mapping[str, str]) -> int:
    text = environment.get(SERVICE_PORT_VARIABLE, "8080")
    if not (text.isdecimal() and 1 <= int(text) <= 65535):
        raise ConfigError(f"{SERVICE_PORT_VARIABLE} is {text!r}: expected a port number from 1 to 65535.")
    return int(text)


def _kubernetes(environment: Mapping[str, str]) -> dict[str, Any]:
    from resources.argo.resource import argo_from_environment
    from resources.inference_service.kserve.resource import serving_from_environment
    from resources.mlflow.resource import MlflowServer
    from resources.object_store.resource import object_store_from_environment
    from resources.trainer.kubernetes import trainer_from_environment

    object_store = object_store_from_environment(environment)
    return {
        "object_store": object_store,
        # without one its own error says so, where it is needed
        "mlflow": MlflowServer(
            tracking_uri=dg.EnvVar("MLFLOW_TRACKING_URI") if environment.get("MLFLOW_TRACKING_URI") else ""
        ),
        "trainer": trainer_from_environment(environment, object_store),
        "serving": serving_from_environment(environment),
        "argo": argo_from_environment(environment),
    }
