"""Tracking in MLflow from a thread of its own: a tracking store that is slow or away costs the training nothing."""

import logging
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from resources.mlflow.target import MlflowTarget, first_line, why_refused

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_LOG = logging.getLogger(__name__)
IDENTITY_TAG = "cifar.training"
"""Tag with the identity of the job spec: finds runs that an earlier attempt at the same training left open."""
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 20.0

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class _Task:
    """One thing to do in MLflow; tried again until it succeeds, is refused or time is up."""

    label: str
    action: Callable[[], None]
    tried_late: bool = False
    """Whether it is tried once when time was up before its turn came."""


class _RefusedError(Exception):
    """Trying again cannot succeed."""


class _NotStoredError(Exception):
    """MLflow accepted something and does not have it."""


class Tracker:
    """One MLflow run. Calls return at once; what they ask for is done in order, in the background.

    Args:
        target: tracking store, experiment, names and tags; None tracks nothing.
        identity: of the job spec.
    """

    def __init__(self, target: MlflowTarget | None, identity: str):
        self.run_id: str | None = None
        self.experiment_id: str | None = None
        self.model_version: str | None = None
        self._target = target
        self._identity = identity
        self._client: MlflowClient | None = None
        self._run: Run | None = None
        self._tasks: queue.Queue[_Task | None] = queue.Queue()
        self._pending: list[str] = []
        self._lock = threading.Lock()
        self._deadline: float | None = None
        self._refusal: str | None = None
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)

    def start(self, params: Mapping[str, object]) -> None:
        """Open the run, with the parameters."""
        if self._target is None:
            return
        self._thread.start()
        self._do("start of the run", self._open_run)
        self._do("parameters", lambda: self._log_params(params))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Metrics of one step, sent as one batch."""
        now = time.time()
        self._do(f"metrics of step {step}", lambda: self._log_batch(metrics, step, now))

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Tags of the run."""
        self._do("tags", lambda: self._set_tags(tags))

    def log_files(self, files: Mapping[str, bytes], folder: str) -> None:
        """Files as artifacts of the run below a folder."""
        self._do(_artifacts(folder), lambda: self._log_files(files, folder))

    def register(self, folder: str, tags: Mapping[str, str]) -> None:
        """A new version of the registered model, from artifacts logged before; one that this run has is kept."""
        self._do("model version", lambda: self._register(folder, tags))

    def close(self, status: RunStatus, patience_seconds: float | None = None) -> list[str]:
        """End the run, waiting for MLflow no longer than told. Returns what could not be sent, in words.

        What MLflow refuses is not waited for.
        """
        if self._target is None or not self._thread.is_alive():
            return []
        if patience_seconds is None:
            patience_seconds = self._target.patience_seconds
        if self._refusal:
            patience_seconds = 0.0
        # whatever failed before: an open run would look like a training that goes on
        self._do(f"end of the run as {status}", lambda: self._end_run(status), tried_late=True)
        self._deadline = time.monotonic() + patience_seconds
        self._tasks.put(None)
        self._thread.join(patience_seconds + 5)
        with self._lock:
            unsent = list(self._pending)
        if unsent:
            reason = f". {self._refusal}" if self._refusal else ""
            _LOG.warning("Not sent to MLflow at %s: %s%s", self._target.tracking_uri, ", ".join(unsent), reason)
        return unsent

    def _do(self, label: str, action: Callable[[], None], tried_late: bool = False) -> None:
        if self._target is None:
            return
        with self._lock:
            self._pending.append(label)
        self._tasks.put(_Task(label, action, tried_late))

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            if (task.tried_late or not self._late) and self._attempt(task):
                with self._lock:
                    self._pending.remove(task.label)

    @property
    def _late(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline

    def _attempt(self, task: _Task) -> bool:
        """Whether the task was done, with as many tries as time allows.

        A run that MLflow refuses to open is tried again while the training lasts: somebody may act on the warning.
        """
        if self._run is None and task.action != self._open_run:
            return False
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                task.action()
                self._refusal = None
                return True
            except Exception as error:
                # whatever MLflow or the network raises must not end the training
                refusal = str(error) if isinstance(error, _RefusedError) else self._why_refused(error)
                if refusal and refusal != self._refusal:
                    _LOG.warning("MLflow: %s was refused: %s", task.label, refusal)
                if refusal and self._run is not None:
                    return False
                self._refusal = refusal
                if not refusal:
                    log = _LOG.warning if pause == _FIRST_PAUSE_SECONDS else _LOG.debug
                    log("MLflow: %s failed and is tried again: %s", task.label, first_line(error))
            wake = time.monotonic() + pause
            while time.monotonic() < wake:
                if self._late:
                    return False
                time.sleep(0.1)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _why_refused(self, error: Exception) -> str | None:
        return why_refused(error, self._target.tracking_uri) if self._target else None

    @property
    def _opened(self) -> "tuple[MlflowClient, Run]":
        if self._client is None or self._run is None:
            raise RuntimeError("the run is not open")
        return self._client, self._run

    def _open_run(self) -> None:
        if self._target is None:
            raise RuntimeError("there is no tracking store")
        # MLflow's own patience, minutes per call, is for programs without a queue of their own
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow import MlflowClient

        client = MlflowClient(self._target.tracking_uri, self._target.tracking_uri)
        experiment_id = _experiment_id(client, self._target)
        _close_left_open(client, experiment_id, self._identity)
        tags = {**self._target.tags, IDENTITY_TAG: self._identity}
        self._run = client.create_run(experiment_id, tags=tags, run_name=self._target.run_name)
        self._client = client
        self.experiment_id = experiment_id
        self.run_id = self._run.info.run_id

    def _log_params(self, params: Mapping[str, object]) -> None:
        from mlflow.entities import Param

        client, run = self._opened
        client.log_batch(run.info.run_id, params=[Param(name, str(value)[:6000]) for name, value in params.items()])

    def _log_batch(self, metrics: Mapping[str, float], step: int, when: float) -> None:
        from mlflow.entities import Metric

        client, run = self._opened
        entities = [Metric(name, value, int(when * 1000), step) for name, value in metrics.items()]
        client.log_batch(run.info.run_id, metrics=entities)

    def _set_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        client, run = self._opened
        client.log_batch(run.info.run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def _log_files(self, files: Mapping[str, bytes], folder: str) -> None:
        client, run = self._opened
        with tempfile.TemporaryDirectory() as name:
            for file, data in files.items():
                Path(name, file).write_bytes(data)
            client.log_artifacts(run.info.run_id, name, folder)
        stored = {Path(item.path).name: item.file_size for item in client.list_artifacts(run.info.run_id, folder)}
        lost = [
            f"{file} ({'missing' if file not in stored else f'{stored[file]} bytes'}, sent {len(data)})"
            for file, data in files.items()
            if stored.get(file) != len(data)
        ]
        if lost:
            raise _NotStoredError(f"{run.info.artifact_uri}/{folder} lacks what was sent: {', '.join(lost)}")

    def _register(self, folder: str, tags: Mapping[str, str]) -> None:
        from mlflow.exceptions import MlflowException

        client, run = self._opened
        name = self._target.registered_model if self._target else None
        if name is None:
            return
        with self._lock:
            if _artifacts(folder) in self._pending:
                raise _RefusedError("its artifacts are not in MLflow")
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        # an attempt before this one may have made it without hearing so
        found = client.search_model_versions(f"name = '{name}' and run_id = '{run.info.run_id}'")
        version = next(iter(found), None) or client.create_model_version(
            name, f"{run.info.artifact_uri}/{folder}", run.info.run_id, tags=dict(tags), await_creation_for=0
        )
        stored = client.get_model_version(name, version.version)
        if any(stored.tags.get(key) != value for key, value in tags.items()):
            raise _NotStoredError(f"version {version.version} of {name} has the tags {stored.tags}, sent {dict(tags)}")
        self.model_version = str(version.version)

    def _end_run(self, status: RunStatus) -> None:
        client, run = self._opened
        client.set_terminated(run.info.run_id, status)
        if (stored := client.get_run(run.info.run_id).info.status) != status:
            raise _NotStoredError(f"run {run.info.run_id} is {stored}")


def _experiment_id(client: "MlflowClient", target: MlflowTarget) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(target.experiment)
    if found is not None:
        return found.experiment_id
    try:
        return client.create_experiment(target.experiment, target.artifact_uri)
    except MlflowException:
        # another process may have made it in between
        found = client.get_experiment_by_name(target.experiment)
        if found is None:
            raise
        return found.experiment_id


def _close_left_open(client: "MlflowClient", experiment_id: str, identity: str) -> None:
    """Mark runs as failed whose process was killed before it could: the same training is starting again."""
    left_open = client.search_runs(
        [experiment_id], f"tags.`{IDENTITY_TAG}` = '{identity}' and attributes.status = 'RUNNING'"
    )
    for run in left_open:
        client.set_terminated(run.info.run_id, "FAILED")


def _artifacts(folder: str) -> str:
    return f"artifacts {folder}/"
