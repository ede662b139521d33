"""MLflow: which models are registered, and artifacts of runs that somebody deleted or that made a retired model."""

from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cifar_assets.prune.policy import Policy, Removal
from resources.mlflow.resource import MlflowResource

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

_PAGE = 200
_SQLITE = "sqlite:///"


class Tracking:
    """The registered model and the experiment of this project, as pruning sees them."""

    def __init__(self, mlflow: MlflowResource, policy: Policy):
        self._mlflow = mlflow
        self._policy = policy
        uri = mlflow.uri
        # opening a database that is not there would make it
        self._is_used = not uri.startswith(_SQLITE) or Path(uri.removeprefix(_SQLITE)).exists()
        self._client = mlflow.client() if self._is_used else None

    def registered(self) -> dict[str, str]:
        """Digests of the models that registered versions name, but for those to be retired, and why they stay."""
        retired = {version.version for version in self._retired({})}
        return {
            version.tags["model_digest"]: f"registered as version {version.version}"
            for version in self._versions()
            if "model_digest" in version.tags and version.version not in retired
        }

    def removals(self, needed: Mapping[str, str]) -> Iterator[Removal]:
        """Registered versions to retire, unless their models are needed, and artifacts of deleted runs."""
        kept_runs = {version.run_id for version in self._versions()}
        for version in self._retired(needed):
            kept_runs.discard(version.run_id)
            yield self._retirement(version)
        for run in self._runs():
            if run.info.run_id not in kept_runs and self._policy.is_old(_changed(run)):
                size = _size(self._artifacts(run))
                if size:
                    reason = "the run was deleted in MLflow"
                    yield Removal("MLflow artifacts", run.info.run_id, reason, size, self._delete_artifacts(run))

    def _retired(self, needed: Mapping[str, str]) -> "list[ModelVersion]":
        if not self._policy.retire_registered:
            return []
        aliased = self._aliased()
        newest_first = sorted(self._versions(), key=lambda version: int(version.version), reverse=True)
        return [
            version
            for version in newest_first[self._policy.keep_versions :]
            if str(version.version) not in aliased
            and version.tags.get("model_digest") not in needed
            and self._policy.is_old(datetime.fromtimestamp((version.last_updated_timestamp or 0) / 1000, UTC))
        ]

    def _versions(self) -> "list[ModelVersion]":
        if self._client is None:
            return []
        found: list[Any] = []
        token = None
        while True:
            page = self._client.search_model_versions(
                f"name = '{self._mlflow.registered_model}'", max_results=_PAGE, page_token=token
            )
            found += page
            token = page.token
            if not token:
                return found

    def _aliased(self) -> set[str]:
        """The versions that have an alias. A listing of versions leaves the aliases out."""
        from mlflow.exceptions import MlflowException

        if self._client is None:
            return set()
        try:
            model = self._client.get_registered_model(self._mlflow.registered_model)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return set()
            raise
        return {str(version) for version in model.aliases.values()}

    def _runs(self) -> "Iterator[Run]":
        from mlflow.entities import ViewType

        experiment = self._client.get_experiment_by_name(self._mlflow.experiment) if self._client else None
        token = None
        while self._client and experiment:
            page = self._client.search_runs(
                [experiment.experiment_id], run_view_type=ViewType.DELETED_ONLY, max_results=_PAGE, page_token=token
            )
            yield from page
            token = page.token
            if not token:
                return

    def _retirement(self, version: "ModelVersion") -> Removal:
        client = self._client
        assert client is not None
        run = client.get_run(version.run_id) if version.run_id else None

        def remove() -> None:
            client.delete_model_version(version.name, version.version)
            if run is not None:
                if run.info.lifecycle_stage == "active":
                    client.delete_run(run.info.run_id)
                self._delete_artifacts(run)()

        name = f"version {version.version}, model {version.tags.get('model_digest', 'unknown')}"
        reason = f"not one of the newest {self._policy.keep_versions}, and without an alias"
        return Removal("registered model", name, reason, _size(self._artifacts(run)) if run else 0, remove)

    def _artifacts(self, run: "Run") -> "ArtifactRepository":
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        return get_artifact_repository(str(run.info.artifact_uri), tracking_uri=self._mlflow.uri)

    def _delete_artifacts(self, run: "Run") -> Callable[[], None]:
        return lambda: self._artifacts(run).delete_artifacts()  # pyright: ignore[reportCallIssue]


def _changed(run: "Run") -> datetime:
    return datetime.fromtimestamp((run.info.end_time or run.info.start_time or 0) / 1000, UTC)


def _size(artifacts: "ArtifactRepository", path: str | None = None) -> int:
    return sum(
        _size(artifacts, info.path) if info.is_dir else info.file_size or 0 for info in artifacts.list_artifacts(path)
    )
