"""Pruning in MLflow: finds registered models; removes retired versions with their runs, and files of deleted runs."""

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_assets.prune.rules import Policy, Removal
from resources.errors import ConfigError
from resources.mlflow.resource import MlflowResource

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

_SQLITE = "sqlite:///"


def open_tracking(mlflow: MlflowResource) -> "MlflowClient | None":
    """None if there is no MLflow or its database does not exist: opening it would create it."""
    try:
        uri = mlflow.uri
        exists = not uri.startswith(_SQLITE) or Path(uri.removeprefix(_SQLITE)).exists()
        return mlflow.client() if exists else None
    except ConfigError:
        return None


def registered_models(client: "MlflowClient", name: str, policy: Policy) -> set[str]:
    """Digests of the models with a registered version; only versions with an alias if the others may be retired."""
    if policy.retire_registered:
        models = client.search_registered_models(f"name = '{name}'")
        versions = [client.get_model_version(name, str(each)) for model in models for each in model.aliases.values()]
    else:
        versions = _versions(client, name)
    return {version.tags.get("model_digest", "") for version in versions}


def prune_tracking(
    client: "MlflowClient", mlflow: MlflowResource, gone: AbstractSet[str], policy: Policy
) -> Iterator[Removal]:
    """The registered versions of models to remove, and the artifacts of deleted runs.

    Versions of models in another store that shares MLflow are kept.
    """
    from mlflow.entities import ViewType

    versions = _versions(client, mlflow.registered_model)
    for version in versions:
        if version.tags.get("model_digest") in gone:
            yield _retirement(client, mlflow.uri, version)
    experiment = client.get_experiment_by_name(mlflow.experiment)
    numbers = [experiment.experiment_id] if experiment else []
    for run in client.search_runs(numbers, run_view_type=ViewType.DELETED_ONLY, max_results=50_000):
        changed = datetime.fromtimestamp((run.info.end_time or run.info.start_time) / 1000, UTC)
        if run.info.run_id not in {version.run_id for version in versions} and policy.is_old(changed):
            artifacts = _artifacts(mlflow.uri, run)
            if size := _size(artifacts):
                reason = "the run was deleted in MLflow"
                yield Removal("MLflow artifacts", run.info.run_id, reason, size, artifacts.delete_artifacts)


def _versions(client: "MlflowClient", name: str) -> "list[ModelVersion]":
    return list(client.search_model_versions(f"name = '{name}'", max_results=200_000))


def _artifacts(uri: str, run: "Run") -> "ArtifactRepository":
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    return get_artifact_repository(str(run.info.artifact_uri), tracking_uri=uri)


def _run(client: "MlflowClient", run_id: str | None) -> "Run | None":
    """None if there is none, for example after `mlflow gc`."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id) if run_id else None
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _retirement(client: "MlflowClient", uri: str, version: "ModelVersion") -> Removal:
    run = _run(client, version.run_id)
    artifacts = _artifacts(uri, run) if run else None

    def remove() -> None:
        client.delete_model_version(version.name, str(version.version))
        if run and artifacts:
            if run.info.lifecycle_stage == "active":
                client.delete_run(run.info.run_id)
            artifacts.delete_artifacts()

    name = f"version {version.version}, model {version.tags['model_digest']}"
    return Removal("registered model", name, "its model is removed", _size(artifacts) if artifacts else 0, remove)


def _size(artifacts: "ArtifactRepository", path: str | None = None) -> int:
    found = artifacts.list_artifacts(path)
    return sum(_size(artifacts, info.path) if info.is_dir else info.file_size or 0 for info in found)
