"""MLflow: which models are registered, and artifacts of deleted runs and of retired models."""

from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_assets.prune.rules import Policy, Removal
from resources.errors import ConfigError
from resources.mlflow.resource import MlflowResource

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

_SQLITE = "sqlite:///"


def open_tracking(mlflow: MlflowResource, policy: Policy) -> "Tracking | None":
    """None where there is no MLflow, or its database does not exist: opening it would create it."""
    try:
        uri = mlflow.uri
        if uri.startswith(_SQLITE) and not Path(uri.removeprefix(_SQLITE)).exists():
            return None
        return Tracking(mlflow, policy)
    except ConfigError:
        return None


class Tracking:
    """The registered model and the experiment of this project, as pruning sees them."""

    def __init__(self, mlflow: MlflowResource, policy: Policy):
        self._mlflow = mlflow
        self._policy = policy
        self._client = mlflow.client()
        self._filter = f"name = '{mlflow.registered_model}'"

    def registered(self) -> set[str]:
        """Digests of the models that registered versions name, except for those to be retired."""
        retired = self._retired(set())
        versions = [version for version in self._versions() if version not in retired]
        return {version.tags["model_digest"] for version in versions if "model_digest" in version.tags}

    def removals(self, needed: AbstractSet[str]) -> Iterator[Removal]:
        """Registered versions to retire, unless their models are needed, and artifacts of deleted runs."""
        from mlflow.entities import ViewType

        for version in self._retired(needed):
            yield self._retirement(version)
        kept_runs = {version.run_id for version in self._versions()}
        experiment = self._client.get_experiment_by_name(self._mlflow.experiment)
        numbers = [experiment.experiment_id] if experiment else []
        for run in _pages(self._client.search_runs, experiment_ids=numbers, run_view_type=ViewType.DELETED_ONLY):
            changed = _time(run.info.end_time or run.info.start_time)
            if run.info.run_id not in kept_runs and self._policy.is_old(changed):
                artifacts = self._artifacts(run)
                if size := _size(artifacts):
                    reason = "the run was deleted in MLflow"
                    yield Removal("MLflow artifacts", run.info.run_id, reason, size, artifacts.delete_artifacts)

    def _versions(self) -> "list[ModelVersion]":
        return list(_pages(self._client.search_model_versions, filter_string=self._filter))

    def _retired(self, needed: AbstractSet[str]) -> "list[ModelVersion]":
        if not self._policy.retire_registered:
            return []
        # A listing of versions leaves the aliases out.
        models = _pages(self._client.search_registered_models, filter_string=self._filter)
        aliased = {str(version) for model in models for version in model.aliases.values()}
        newest_first = sorted(self._versions(), key=lambda version: int(version.version), reverse=True)
        return [
            version
            for version in newest_first[self._policy.keep_versions :]
            if str(version.version) not in aliased
            and version.tags.get("model_digest") not in needed
            and self._policy.is_old(_time(version.last_updated_timestamp))
        ]

    def _retirement(self, version: "ModelVersion") -> Removal:
        run = self._client.get_run(version.run_id) if version.run_id else None
        artifacts = self._artifacts(run) if run else None

        def remove() -> None:
            self._client.delete_model_version(version.name, str(version.version))
            if run and artifacts:
                if run.info.lifecycle_stage == "active":
                    self._client.delete_run(run.info.run_id)
                artifacts.delete_artifacts()

        name = f"version {version.version}, model {version.tags.get('model_digest', 'unknown')}"
        reason = f"not one of the newest {self._policy.keep_versions}, and without an alias"
        return Removal("registered model", name, reason, _size(artifacts) if artifacts else 0, remove)

    def _artifacts(self, run: "Run") -> Any:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        return get_artifact_repository(str(run.info.artifact_uri), tracking_uri=self._mlflow.uri)


def _pages(search: Callable[..., Any], **options: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(**options, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _time(milliseconds: int | None) -> datetime:
    return datetime.fromtimestamp((milliseconds or 0) / 1000, UTC)


def _size(artifacts: "ArtifactRepository", path: str | None = None) -> int:
    return sum(
        _size(artifacts, info.path) if info.is_dir else info.file_size or 0 for info in artifacts.list_artifacts(path)
    )
