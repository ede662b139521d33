"""Tracking in MLflow from a thread of its own: a tracking store that is slow or away costs the training nothing."""

import logging
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from resources.mlflow.target import MlflowTarget, first_line, why_refused

if TYPE_CHECKING:
    # imported in the thread: it takes a second that the training need not wait for
    from mlflow import MlflowClient
    from mlflow.entities import Run

_LOG = logging.getLogger(__name__)
IDENTITY_TAG = "cifar.training"
"""Tag with the identity of the job spec: finds runs that an earlier attempt at the same training left open."""
_FOLDER = "model"
_START, _ARTIFACTS = "start of the run", f"artifacts {_FOLDER}/"
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 20.0

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
_Action = Callable[["MlflowClient", "Run"], object]


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
        self.model_version: str | None = None
        self._target = target
        self._identity = identity
        self._tasks: queue.Queue[tuple[str, _Action] | RunStatus] = queue.Queue()
        self._unsent: list[str] = []
        self._deadline = float("inf")
        self._refusal: str | None = None
        self._thread: threading.Thread | None = None

    def start(self, params: Mapping[str, object]) -> None:
        """Open the run, with the parameters."""
        if self._target is not None:
            self._unsent.append(_START)
            self._thread = threading.Thread(target=self._work, args=(self._target,), name="mlflow", daemon=True)
            self._thread.start()

        def log(client: "MlflowClient", run: "Run") -> None:
            from mlflow.entities import Param

            entities = [Param(name, str(value)[:6000]) for name, value in params.items()]
            client.log_batch(run.info.run_id, params=entities)

        self._do("parameters", log)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Metrics of one step, sent as one batch."""
        now = int(time.time() * 1000)

        def log(client: "MlflowClient", run: "Run") -> None:
            from mlflow.entities import Metric

            entities = [Metric(name, value, now, step) for name, value in metrics.items()]
            client.log_batch(run.info.run_id, metrics=entities)

        self._do(f"metrics of step {step}", log)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Tags of the run."""

        def log(client: "MlflowClient", run: "Run") -> None:
            for name, value in tags.items():
                client.set_tag(run.info.run_id, name, value)

        self._do("tags", log)

    def log_model(self, files: Mapping[str, bytes], tags: Mapping[str, str]) -> None:
        """Files as artifacts of the run, then a version of the registered model from them, with the tags."""
        self._do(_ARTIFACTS, lambda client, run: _log_files(client, run, files))
        if self._target is not None and (name := self._target.registered_model):
            self._do("model version", lambda client, run: self._register(client, run, name, tags))

    def close(self, status: RunStatus, patience_seconds: float | None = None) -> list[str]:
        """End the run, waiting for MLflow no longer than told. Returns in words what could not be sent.

        There is no wait for what MLflow refuses. Another call does nothing.
        """
        if self._target is None or self._thread is None:
            return []
        if patience_seconds is None:
            patience_seconds = self._target.patience_seconds
        if self._refusal:
            patience_seconds = 0.0
        self._unsent.append(_end(status))
        self._deadline = time.monotonic() + patience_seconds
        self._tasks.put(status)
        self._thread.join(patience_seconds + 5)
        self._thread = None
        unsent = list(self._unsent)
        if unsent:
            reason = f". {self._refusal}" if self._refusal else ""
            _LOG.warning("Not sent to MLflow at %s: %s%s", self._target.tracking_uri, ", ".join(unsent), reason)
        return unsent

    def _do(self, label: str, action: _Action) -> None:
        if self._thread is not None:
            self._unsent.append(label)
            self._tasks.put((label, action))

    def _work(self, target: MlflowTarget) -> None:
        # MLflow's own patience, minutes per call, is for programs without a queue of their own
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        opened: list[tuple[MlflowClient, Run]] = []
        # one that is refused is tried again while the training lasts: somebody may act on the warning
        if not self._attempt(_START, lambda: opened.append(self._open_run(target)), gives_up=False):
            return
        client, run = opened[0]
        self.run_id = run.info.run_id
        while isinstance(task := self._tasks.get(), tuple):
            label, action = task
            if not self._is_late():
                self._attempt(label, lambda action=action: action(client, run))
        # tried even when it is late: an open run would look like a training that continues
        self._attempt(_end(task), lambda status=task: _end_run(client, run, status))

    def _is_late(self) -> bool:
        return time.monotonic() > self._deadline

    def _attempt(self, label: str, action: Callable[[], object], gives_up: bool = True) -> bool:
        """Whether it was done, with as many tries as time allows; `gives_up` when MLflow refuses it."""
        pause = _FIRST_PAUSE_SECONDS
        while True:
            try:
                action()
                self._refusal = None
                self._unsent.remove(label)
                return True
            except Exception as error:
                # whatever MLflow or the network raises must not end the training
                uri = self._target.tracking_uri if self._target else ""
                refusal = str(error) if isinstance(error, _RefusedError) else why_refused(error, uri)
                if refusal and refusal != self._refusal:
                    _LOG.warning("MLflow: %s was refused: %s", label, refusal)
                if refusal and gives_up:
                    return False
                self._refusal = refusal
                if not refusal:
                    log = _LOG.warning if pause == _FIRST_PAUSE_SECONDS else _LOG.debug
                    log("MLflow: %s failed and is tried again: %s", label, first_line(error))
            wake = time.monotonic() + pause
            while time.monotonic() < wake:
                if self._is_late():
                    return False
                time.sleep(0.1)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)

    def _open_run(self, target: MlflowTarget) -> "tuple[MlflowClient, Run]":
        from mlflow import MlflowClient

        for name in ("alembic", "mlflow.store.db"):  # opening a sqlite store logs every step of the schema migration
            logging.getLogger(name).setLevel(logging.WARNING)
        client = MlflowClient(target.tracking_uri, target.tracking_uri)
        experiment_id = _experiment_id(client, target)
        # runs whose process was killed before it could end them: the same training is starting again
        same = f"tags.`{IDENTITY_TAG}` = '{self._identity}' and attributes.status = 'RUNNING'"
        for left_open in client.search_runs([experiment_id], same):
            client.set_terminated(left_open.info.run_id, "FAILED")
        tags = {**target.tags, IDENTITY_TAG: self._identity}
        return client, client.create_run(experiment_id, tags=tags, run_name=target.run_name)

    def _register(self, client: "MlflowClient", run: "Run", name: str, tags: Mapping[str, str]) -> None:
        from mlflow.exceptions import MlflowException

        if _ARTIFACTS in self._unsent:
            raise _RefusedError("its artifacts are not in MLflow")
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        # an attempt before this one may have created it, and its answer was lost
        found = client.search_model_versions(f"name = '{name}' and run_id = '{run.info.run_id}'")
        version = next(iter(found), None) or client.create_model_version(
            name, f"{run.info.artifact_uri}/{_FOLDER}", run.info.run_id, tags=dict(tags), await_creation_for=0
        )
        stored = client.get_model_version(name, version.version)
        if any(stored.tags.get(key) != value for key, value in tags.items()):
            raise _NotStoredError(f"version {version.version} of {name} has the tags {stored.tags}, sent {dict(tags)}")
        self.model_version = str(version.version)


def _end(status: RunStatus) -> str:
    return f"end of the run as {status}"


def _end_run(client: "MlflowClient", run: "Run", status: RunStatus) -> None:
    client.set_terminated(run.info.run_id, status)
    if (stored := client.get_run(run.info.run_id).info.status) != status:
        raise _NotStoredError(f"run {run.info.run_id} is {stored}")


def _log_files(client: "MlflowClient", run: "Run", files: Mapping[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as name:
        for file, data in files.items():
            Path(name, file).write_bytes(data)
        client.log_artifacts(run.info.run_id, name, _FOLDER)
    stored = {Path(item.path).name: item.file_size for item in client.list_artifacts(run.info.run_id, _FOLDER)}
    lost = [
        f"{file} ({'missing' if file not in stored else f'{stored[file]} bytes'}, sent {len(data)})"
        for file, data in files.items()
        if stored.get(file) != len(data)
    ]
    if lost:
        raise _NotStoredError(f"{run.info.artifact_uri}/{_FOLDER} lacks what was sent: {', '.join(lost)}")


def _experiment_id(client: "MlflowClient", target: MlflowTarget) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(target.experiment)
    if found is None:
        try:
            return client.create_experiment(target.experiment, target.artifact_uri)
        except MlflowException:
            # another process may have created it in between
            found = client.get_experiment_by_name(target.experiment)
            if found is None:
                raise
    return found.experiment_id
