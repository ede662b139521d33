"""Tracking in MLflow in a separate thread, so that a slow or unavailable tracking store does not delay the training."""

import logging
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from resources.mlflow.target import MlflowTarget, first_line, open_client, why_refused

if TYPE_CHECKING:
    # imported in the thread: takes a second, and the training does not wait for it
    from mlflow import MlflowClient
    from mlflow.entities import Run

_LOG = logging.getLogger(__name__)
IDENTITY_TAG = "cifar.training"
"""Tag with the identity of the job spec: used to find runs that an earlier attempt at the same training left open."""
_FOLDER = "model"
_START = "start of the run"
_PAUSE_SECONDS = 2.0

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
_Action = Callable[["MlflowClient", "Run"], object]


class Tracker:
    """One MLflow run; without a target nothing is tracked. Calls return immediately and run in order in a thread."""

    def __init__(self, target: MlflowTarget | None, identity: str):
        self.run_id: str | None = None
        self.model_version: str | None = None
        self._target = target
        self._identity = identity
        self._tasks: queue.Queue[tuple[str, _Action] | RunStatus] = queue.Queue()
        self._unsent: list[str] = []
        self._deadline = float("inf")
        self._refusal: str | None = None
        """The reason why the run cannot be opened."""
        self._thread: threading.Thread | None = None

    def start(self, params: Mapping[str, object]) -> None:
        """Open the run, with the parameters."""
        if self._target is not None:
            self._unsent.append(_START)
            self._thread = threading.Thread(target=self._work, args=(self._target,), name="mlflow", daemon=True)
            self._thread.start()
        self.log("parameters", params=params)

    def log(
        self,
        label: str,
        *,
        metrics: Mapping[str, float] | None = None,
        step: int = 0,
        params: Mapping[str, object] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Log these in one request, the metrics for a step. `label` names them in warnings."""
        now = int(time.time() * 1000)

        def send(client: "MlflowClient", run: "Run") -> None:
            from mlflow.entities import Metric, Param, RunTag

            client.log_batch(
                run.info.run_id,
                [Metric(name, value, now, step) for name, value in (metrics or {}).items()],
                [Param(name, str(value)[:6000]) for name, value in (params or {}).items()],
                [RunTag(name, value) for name, value in (tags or {}).items()],
            )

        self._do(label, send)

    def log_model(self, files: Mapping[str, bytes], tags: Mapping[str, str]) -> None:
        """Upload files as artifacts of the run, then register a model version with the tags."""

        def log(client: "MlflowClient", run: "Run") -> None:
            _log_files(client, run, files)
            if self._target is not None and (name := self._target.registered_model):
                self.model_version = _register(client, run, name, tags)

        self._do("model", log)

    def close(self, status: RunStatus, patience_seconds: float | None = None) -> list[str]:
        """End the run, waiting for MLflow at most this long. Returns a description of what could not be sent.

        Does not wait if MLflow refuses to open the run. A second call does nothing.
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
        opened: list[tuple[MlflowClient, Run]] = []
        self._attempt(_START, lambda: opened.append(_open_run(target, self._identity)), target)
        if not opened:
            return
        client, run = opened[0]
        self.run_id = run.info.run_id
        while isinstance(task := self._tasks.get(), tuple):
            label, action = task
            if time.monotonic() < self._deadline:
                self._attempt(label, partial(action, client, run), target)
        # tried even after the deadline: an open run would look like a running training
        self._attempt(_end(task), lambda status=task: _end_run(client, run, status), target)

    def _attempt(self, label: str, action: Callable[[], object], target: MlflowTarget) -> None:
        """Retry until the deadline. Refused requests are dropped.

        The start of the run is retried even if refused: somebody may act on the warning while the training runs.
        """
        said = ""
        while True:
            try:
                action()
                self._refusal = None
                self._unsent.remove(label)
                return
            except Exception as error:
                # no exception of MLflow or the network may end the training
                refusal = why_refused(error, target.tracking_uri)
                what = f"was refused: {refusal}" if refusal else f"failed and will be retried: {first_line(error)}"
                if refusal and label != _START:
                    _LOG.warning("MLflow: %s %s", label, what)
                    return
                self._refusal = refusal
                _LOG.log(logging.DEBUG if what == said else logging.WARNING, "MLflow: %s %s", label, what)
                said = what
            time.sleep(max(0.0, min(_PAUSE_SECONDS, self._deadline - time.monotonic())))
            if time.monotonic() >= self._deadline:
                return


def _open_run(target: MlflowTarget, identity: str) -> "tuple[MlflowClient, Run]":
    client = open_client(target.tracking_uri)
    found = client.get_experiment_by_name(target.experiment)
    experiment_id = found.experiment_id if found else client.create_experiment(target.experiment, target.artifact_uri)
    # runs whose process was killed before it could end them: the same training is starting again here
    same = f"tags.`{IDENTITY_TAG}` = '{identity}' and attributes.status = 'RUNNING'"
    for left_open in client.search_runs([experiment_id], same):
        client.set_terminated(left_open.info.run_id, "FAILED")
    return client, client.create_run(
        experiment_id, tags={**target.tags, IDENTITY_TAG: identity}, run_name=target.run_name
    )


def _log_files(client: "MlflowClient", run: "Run", files: Mapping[str, bytes]) -> None:
    with tempfile.TemporaryDirectory(prefix="cifar-mlflow-") as name:
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
        raise RuntimeError(f"{run.info.artifact_uri}/{_FOLDER} lacks what was sent: {', '.join(lost)}")


def _register(client: "MlflowClient", run: "Run", name: str, tags: Mapping[str, str]) -> str:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # an earlier attempt may have created it without receiving the response
    found = client.search_model_versions(f"name = '{name}' and run_id = '{run.info.run_id}'")
    version = next(iter(found), None) or client.create_model_version(
        name, f"{run.info.artifact_uri}/{_FOLDER}", run.info.run_id, tags=dict(tags), await_creation_for=0
    )
    stored = client.get_model_version(name, version.version)
    if any(stored.tags.get(key) != value for key, value in tags.items()):
        raise RuntimeError(f"version {version.version} of {name} has the tags {stored.tags}, sent {dict(tags)}")
    return str(version.version)


def _end(status: RunStatus) -> str:
    return f"end of the run as {status}"


def _end_run(client: "MlflowClient", run: "Run", status: RunStatus) -> None:
    client.set_terminated(run.info.run_id, status)
    if (stored := client.get_run(run.info.run_id).info.status) != status:
        raise RuntimeError(f"run {run.info.run_id} is {stored}")
