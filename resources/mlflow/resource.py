"""The MLflow resource.

dagster-mlflow's resource binds one global MLflow run to a Dagster run and closes it in a hook that does not run for
asset materializations. Here the trainer opens and closes its run, tagged with dagster-mlflow's `dagster_run_id`, so an
op with that resource joins it. A run that a killed trainer left open is closed by its step, its next attempt or a
sensor.
"""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
from pydantic import Field

from resources.dagster_storage import is_database_outage
from resources.errors import ConfigError
from resources.kubernetes.errors import ApiError
from resources.mlflow.target import DEFAULT_NAME, MlflowTarget, check_tracking_uri, open_client, why_refused
from resources.step_context import StepContext
from resources.verdict import Verdict

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

CHAMPION_ALIAS = "champion"
RUN_ID_TAG = "dagster_run_id"
"""The tag that dagster-mlflow sets on its runs."""
ATTEMPT_TAG = "dagster_attempt"
JOB_TAG = "dagster_job_name"
RUN_METADATA = "mlflow_run"
"""Metadata key of a trained model for its MLflow run."""

_MAX_RUNNING = 200


class MlflowResource(dg.ConfigurableResource):
    """Tracking server, experiment and registered model of this project."""

    experiment: str = Field(default=DEFAULT_NAME, description="Experiment that trainings are logged to.")
    registered_model: str = Field(default=DEFAULT_NAME, description="Name of the registered model.")

    @property
    @abstractmethod
    def uri(self) -> str:
        """Tracking URI: sqlite:///... or http(s)://..."""

    def client(self) -> "MlflowClient":
        return open_client(self.uri)

    @contextmanager
    def _connected(self) -> "Iterator[MlflowClient]":
        """A client. Its errors for refused requests become a ConfigError that says what to do."""
        try:
            yield self.client()
        except ConfigError:
            raise
        except Exception as error:
            if reason := why_refused(error, self.uri):
                raise ConfigError(f"MLflow refused: {reason}") from error
            raise

    def artifact_uri(self) -> str | None:
        """Artifact location of a new experiment; None leaves it to the server."""
        return None

    def prepare(self) -> None:
        """Create what must exist before the first use."""

    def target(self, context: StepContext) -> MlflowTarget:
        """The tracking target for the trainer."""
        return MlflowTarget(
            tracking_uri=self.uri,
            experiment=self.experiment,
            artifact_uri=self.artifact_uri(),
            run_name=f"{context.run.job_name}-{context.run.run_id[:8]}",
            registered_model=self.registered_model,
            tags={
                RUN_ID_TAG: context.run.run_id,
                ATTEMPT_TAG: str(context.retry_number),
                JOB_TAG: context.run.job_name,
            },
        )

    @contextmanager
    def closing_open_runs(self, context: StepContext) -> Iterator[None]:
        """On an error, end runs that the trainer left RUNNING: KILLED if canceled, FAILED otherwise.

        An interrupt without cancellation, such as an eviction of this process, closes nothing, and neither does an
        outage of Dagster's database or the cluster's API: the training may continue, and be adopted by a retry.
        """
        try:
            yield
        except BaseException as error:
            if is_database_outage(error):  # then it also cannot say whether the run is canceled
                raise
            try:
                from resources.kubernetes.steps import is_being_cancelled  # a laptop needs no kubernetes until here

                ended = isinstance(error, Exception) and not isinstance(error.__cause__, ApiError)
                if (cancelled := is_being_cancelled(context)) or ended:
                    for run_id, dagster_run_id in self.running().items():
                        if dagster_run_id == context.run.run_id:
                            self.close_run(run_id, "KILLED" if cancelled else "FAILED")
            except Exception as failure:
                context.log.warning(f"Could not close this run's MLflow runs; a sensor will retry: {failure}")
            raise

    def running(self) -> dict[str, str]:
        """Ids of the newest runs that MLflow shows as RUNNING, and of their Dagster runs.

        Returns one page of the newest, so that old runs of other Dagster instances, which cannot be closed here, do not
        hide the relevant ones.
        """
        with self._connected() as client:
            experiment = client.get_experiment_by_name(self.experiment)
            if experiment is None:
                return {}
            found = client.search_runs(
                [experiment.experiment_id],
                f"tags.{RUN_ID_TAG} LIKE '%' and attributes.status = 'RUNNING'",
                max_results=_MAX_RUNNING,
                order_by=["attributes.start_time DESC"],
            )
            return {run.info.run_id: run.data.tags[RUN_ID_TAG] for run in found}

    def close_run(self, run_id: str, status: str, ended_at: float | None = None) -> None:
        """End a run, now or at the given time in seconds since the epoch."""
        with self._connected() as client:
            client.set_terminated(run_id, status, None if ended_at is None else int(1000 * ended_at))

    def run_link(self, run_id: str | None) -> dg.MetadataValue:
        """A link to the run if a server shows it, otherwise its id."""
        if run_id is None:
            return dg.MetadataValue.text("not tracked")
        try:
            if not self.uri.startswith("http"):
                return dg.MetadataValue.text(run_id)
            experiment = self.client().get_run(run_id).info.experiment_id
        except Exception as error:
            # The model is already stored: an unavailable server must not fail its materialization.
            return dg.MetadataValue.text(f"{run_id}; MLflow did not respond: {error}")
        return dg.MetadataValue.url(f"{self.uri}/#/experiments/{experiment}/runs/{run_id}")

    def find_version(self, model_digest: str) -> "ModelVersion | None":
        """The newest registered version with this digest."""
        with self._connected() as client:
            versions = client.search_model_versions(
                f"name = '{self.registered_model}' and tags.model_digest = '{model_digest}'"
            )
            return max(versions, key=lambda version: int(version.version), default=None)

    def champion_digest(self) -> str | None:
        """Digest of the model that the champion alias names, or None."""
        from mlflow.exceptions import MlflowException

        with self._connected() as client:
            try:
                version = client.get_model_version_by_alias(self.registered_model, CHAMPION_ALIAS)
            except MlflowException as error:
                if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    return None
                raise
            return version.tags.get("model_digest")

    def record_decision(self, model_digest: str, verdict: Verdict, dagster_run_id: str) -> str | None:
        """Write the gate's decision on the model's version; the champion alias moves only if the gate passed.

        Returns the registered version's number, or None if the model was never registered.
        """
        version = self.find_version(model_digest)
        if version is None:
            return None
        tags = {
            "gate": "passed" if verdict.passed else "refused",
            "gate_reason": verdict.reason,
            "gate_dagster_run_id": dagster_run_id,
        }
        with self._connected() as client:
            for key, value in tags.items():
                client.set_model_version_tag(self.registered_model, version.version, key, value)
            if verdict.passed:
                client.set_registered_model_alias(self.registered_model, CHAMPION_ALIAS, version.version)
            stored = client.get_model_version(self.registered_model, version.version)
            if not tags.items() <= stored.tags.items() or (verdict.passed and CHAMPION_ALIAS not in stored.aliases):
                raise RuntimeError(
                    f"MLflow accepted the decision on version {version.version} but did not store it: the version's "
                    f"tags are {stored.tags}, its aliases {stored.aliases}."
                )
            return str(version.version)


class LocalMlflow(MlflowResource):
    """A SQLite file and an artifact folder; `mlflow ui --backend-store-uri` shows them."""

    path: str = Field(default=".cifar/mlflow", description="Folder for the database and the artifacts.")

    @property
    def uri(self) -> str:
        return f"sqlite:///{Path(self.path).resolve() / 'mlflow.db'}"

    def artifact_uri(self) -> str | None:
        return (Path(self.path).resolve() / "artifacts").as_uri()

    def running(self) -> dict[str, str]:
        # a query would create the database, and without its folder take minutes to fail
        return super().running() if (Path(self.path) / "mlflow.db").exists() else {}

    def prepare(self) -> None:
        Path(self.path).mkdir(parents=True, exist_ok=True)


class MlflowServer(MlflowResource):
    """A tracking server with proxied artifacts, so that trainers need no credentials for the artifact store."""

    tracking_uri: str = Field(description="Address of the server, such as http://mlflow.cifar.svc:5000.")

    @property
    def uri(self) -> str:
        if not self.tracking_uri:
            raise ConfigError("No MLflow is configured: MLFLOW_TRACKING_URI is not set.")
        return check_tracking_uri(self.tracking_uri, "MLFLOW_TRACKING_URI")
