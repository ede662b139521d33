"""MLflow as Dagster uses it.

dagster-mlflow's own resource binds one global MLflow run to a Dagster run and leaves closing it to a hook that asset
materializations do not run. Here the trainer opens and closes its run, tagged with dagster-mlflow's `dagster_run_id`:
an op with that resource joins it. What a killed trainer left open is closed by its step, its next attempt or a sensor.
"""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
from pydantic import Field

from resources.errors import ConfigError
from resources.mlflow.target import DEFAULT_NAME, MlflowTarget, check_tracking_uri, open_client, why_refused
from resources.verdict import Verdict

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

CHAMPION_ALIAS = "champion"
RUN_ID_TAG = "dagster_run_id"
"""The tag dagster-mlflow puts on its runs."""
ATTEMPT_TAG = "dagster_attempt"
JOB_TAG = "dagster_job_name"
RUN_METADATA = "mlflow_run"
"""Key of a trained model's metadata that names the MLflow run."""

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
        """A client. Its error for a refusal becomes a ConfigError that says what to do."""
        try:
            yield self.client()
        except ConfigError:
            raise
        except Exception as error:
            if reason := why_refused(error, self.uri):
                raise ConfigError(f"MLflow refused: {reason}") from error
            raise

    def artifact_uri(self) -> str | None:
        """Where a new experiment keeps its artifacts; None leaves that to the server."""
        return None

    def prepare(self) -> None:
        """Make what must exist before the first use."""

    def target(self, context: dg.AssetExecutionContext) -> MlflowTarget:
        """What the trainer is told about MLflow."""
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
    def closing_open_runs(self, context: dg.AssetExecutionContext) -> Iterator[None]:
        """On leaving with an error, end what the trainer left RUNNING: KILLED when cancelled, FAILED otherwise.

        An interrupt without a cancel, such as an eviction of this process, closes nothing: the training may continue.
        """
        from resources.kubernetes.steps import is_being_cancelled  # not at loading: a laptop needs no kubernetes

        try:
            yield
        except BaseException as error:
            try:
                if (cancelled := is_being_cancelled(context)) or isinstance(error, Exception):
                    for run_id, dagster_run_id in self.running().items():
                        if dagster_run_id == context.run.run_id:
                            self.close_run(run_id, "KILLED" if cancelled else "FAILED")
            except Exception as failure:
                context.log.warning(f"Could not close this run's MLflow runs; a sensor tries again: {failure}")
            raise

    def running(self) -> dict[str, str]:
        """Ids of the newest runs that MLflow shows as RUNNING, and of their Dagster runs.

        Those of other instances of Dagster, which nobody here can close, must not hide the ones that matter: hence the
        newest, in one page.
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
        """End a run, now or as of then in seconds since the epoch."""
        with self._connected() as client:
            client.set_terminated(run_id, status, None if ended_at is None else int(1000 * ended_at))

    def run_link(self, run_id: str | None) -> dg.MetadataValue:
        """Where a person finds the run: a link where a server shows it, otherwise its id."""
        if run_id is None:
            return dg.MetadataValue.text("not tracked")
        try:
            if not self.uri.startswith("http"):
                return dg.MetadataValue.text(run_id)
            experiment = self.client().get_run(run_id).info.experiment_id
        except Exception as error:
            # The model is stored by now: a server that is away must not fail its materialization.
            return dg.MetadataValue.text(f"{run_id}; MLflow did not answer: {error}")
        return dg.MetadataValue.url(f"{self.uri}/#/experiments/{experiment}/runs/{run_id}")

    def find_version(self, model_digest: str) -> "ModelVersion | None":
        """The newest registered version that carries the digest."""
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
        """Write the gate's decision on the model's version; the champion alias moves only when it passed.

        Returns the registered version's number, or None where the model was never registered.
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
                    f"MLflow accepted the decision on version {version.version} and does not have it: the version's "
                    f"tags are {stored.tags}, its aliases {stored.aliases}."
                )
            return str(version.version)


class LocalMlflow(MlflowResource):
    """A sqlite file and a folder of artifacts; `mlflow ui --backend-store-uri` on the file shows them."""

    path: str = Field(default=".cifar/mlflow", description="Folder of the database and the artifacts.")

    @property
    def uri(self) -> str:
        return f"sqlite:///{Path(self.path).resolve() / 'mlflow.db'}"

    def artifact_uri(self) -> str | None:
        return (Path(self.path).resolve() / "artifacts").as_uri()

    def running(self) -> dict[str, str]:
        # looking would make the database, and without its folder take minutes to fail
        return super().running() if (Path(self.path) / "mlflow.db").exists() else {}

    def prepare(self) -> None:
        Path(self.path).mkdir(parents=True, exist_ok=True)


class MlflowServer(MlflowResource):
    """A tracking server, its artifacts proxied, so that trainers need no credentials of the artifact store."""

    tracking_uri: str = Field(description="Address of the server, such as http://mlflow.cifar.svc:5000.")

    @property
    def uri(self) -> str:
        if not self.tracking_uri:
            raise ConfigError("No MLflow is configured: MLFLOW_TRACKING_URI is not set.")
        return check_tracking_uri(self.tracking_uri, "MLFLOW_TRACKING_URI")
