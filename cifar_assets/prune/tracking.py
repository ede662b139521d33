"""MLflow follows the store: a version without an alias goes with its model, and takes its run and artifacts along."""

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_assets.prune.rules import Removal
from resources.errors import ConfigError
from resources.mlflow.resource import MlflowResource

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

_SQLITE = "sqlite:///"


def open_tracking(mlflow: MlflowResource) -> "MlflowClient | None":
    """None where there is no MLflow, or its database does not exist: opening it would create it."""
    try:
        uri = mlflow.uri
        exists = not uri.startswith(_SQLITE) or Path(uri.removeprefix(_SQLITE)).exists()
        return mlflow.client() if exists else None
    except ConfigError:
        return None


def aliased_models(client: "MlflowClient", name: str) -> set[str]:
    """Digests of the models whose versions have an alias, such as champion."""
    models = client.search_registered_models(f"name = '{name}'")
    versions = [client.get_model_version(name, str(each)) for model in models for each in model.aliases.values()]
    return {version.tags.get("model_digest", "") for version in versions}


def prune_tracking(client: "MlflowClient", mlflow: MlflowResource, gone: AbstractSet[str]) -> Iterator[Removal]:
    """The registered versions of models that go. Those of models in another store, which may share MLflow, stay."""
    for version in client.search_model_versions(f"name = '{mlflow.registered_model}'"):
        if version.tags.get("model_digest") in gone:
            yield _retirement(client, mlflow.uri, version)


def _retirement(client: "MlflowClient", uri: str, version: "ModelVersion") -> Removal:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    run = client.get_run(version.run_id) if version.run_id else None
    artifacts = get_artifact_repository(str(run.info.artifact_uri), tracking_uri=uri) if run else None

    def remove() -> None:
        client.delete_model_version(version.name, str(version.version))
        if run and artifacts:
            if run.info.lifecycle_stage == "active":
                client.delete_run(run.info.run_id)
            artifacts.delete_artifacts()

    name = f"version {version.version}, model {version.tags['model_digest']}"
    return Removal("registered model", name, "its model is not kept", _size(artifacts) if artifacts else 0, remove)


def _size(artifacts: "ArtifactRepository", path: str | None = None) -> int:
    found = artifacts.list_artifacts(path)
    return sum(_size(artifacts, info.path) if info.is_dir else info.file_size or 0 for info in found)
