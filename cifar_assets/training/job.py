"""One training job, from its spec to a published model."""

import io
import json
import logging
import os
from collections.abc import Callable
from typing import Any

import torch

from cifar_assets.contracts import BASELINE_MODEL_KEY
from cifar_assets.model_package import LOG_FILE, MANIFEST_FILE, METRICS_FILE, PERFORMANCE_FILE, write_package
from cifar_assets.training import distributed
from cifar_assets.training.checkpoint import CheckpointStore, EpochRecord
from cifar_assets.training.data import open_data
from cifar_assets.training.device import choose_processor, use_repeatable_kernels, use_threads
from cifar_assets.training.distributed import PeerLostError, StopSignal, TrainingStopped
from cifar_assets.training.loop import Trainer
from cifar_assets.training.networks import PublishedNetwork
from cifar_assets.training.package import baseline_copy_bytes, build_package, readable_json
from cifar_assets.training.spec import JobSpec
from cifar_assets.training.tracking import RunStatus, Tracker
from resources.errors import StoreError
from resources.model_signature import signing_key_from
from resources.object_store import open_store

_LOG = logging.getLogger(__name__)
_STOP_PATIENCE_SECONDS = 8.0
"""Kubernetes kills a pod 30 seconds after SIGTERM: the checkpoint comes first, MLflow gets part of the rest."""
CHECKPOINTS = "checkpoints"
_EPOCH_METRICS = {"train_loss", "validation_loss", "validation_accuracy", "images_per_second", "learning_rate"}


SendMessage = Callable[[dict[str, Any]], None]
"""Sends Dagster a message; its `type` is `epoch` or `result`."""


def run_job(spec: JobSpec, stop: StopSignal, send: SendMessage, log: io.StringIO) -> dict[str, Any] | None:
    """Train according to the spec and publish the model with the log. Returns the model's metrics on rank 0, else None.

    Raises TrainingStopped when asked to stop, when the store is not reachable or when another process was lost,
    ConfigError and DataError for errors that the user must correct.
    """
    signing_key = signing_key_from(os.environ)  # an invalid one is refused before hours of training
    processes = distributed.read_processes()
    use_threads(spec.execution)
    processor = choose_processor(spec.execution, spec.recipe.precision, processes.local_rank)
    use_repeatable_kernels(processor.device)
    with distributed.noticing_lost_peers(processes):
        distributed.join(processes, processor.device)
    # before this there is nothing to save, and a signal may end a process that waits for the others
    stop.install()
    tracker = Tracker(None if processes.rank else spec.mlflow, spec.identity)
    status: RunStatus = "FAILED"
    patience: float | None = None
    try:
        recipe = {f"recipe.{name}": value for name, value in spec.recipe.model_dump(mode="json").items()}
        start = {"start_weights": spec.start.sha256} if spec.start else {}
        tracker.start({**recipe, **start, "seed": spec.seed, "dataset_digest": spec.dataset_digest})
        with distributed.noticing_lost_peers(processes):
            data = open_data(spec, processor.device)
            trainer = Trainer(spec, data, processor, processes, _checkpoints(spec), stop)
            _announce(trainer, tracker)
            trainer.train(lambda record: _report_epoch(spec, record, send, tracker))
            network = PublishedNetwork(trainer.published(), data.manifest.mean, data.manifest.std, spec.recipe.views)
            if processes.rank == 0:
                return _publish(trainer, network.eval().to(processor.device), signing_key, send, tracker, log)
    except TrainingStopped as error:
        if not isinstance(error, PeerLostError):
            status, patience = "KILLED", _STOP_PATIENCE_SECONDS
        raise
    except StoreError as error:
        if not error.transient:
            raise
        raise TrainingStopped(f"{error} Start the same spec again to continue from the last checkpoint.") from error
    finally:
        tracker.close(status, patience)  # already closed if the model was published
        distributed.leave(processes)


def clear_checkpoints(spec: JobSpec) -> None:
    """Remove a finished job's checkpoints, which a restart needs until Dagster has received the model."""
    try:
        _checkpoints(spec).clear()
    except StoreError as error:
        _LOG.warning("Could not remove the checkpoints: %s", error)


def _checkpoints(spec: JobSpec) -> CheckpointStore:
    folder = open_store(spec.output_uri).at(f"{CHECKPOINTS}/{spec.identity}")
    return CheckpointStore(folder, spec.execution.keep_checkpoints)


def _announce(trainer: Trainer, tracker: Tracker) -> None:
    recipe, processor = trainer.spec.recipe, trainer.processor
    what = f"{recipe.name} ({recipe.network}, {recipe.epochs} epochs), seed {trainer.spec.seed}"
    where = f"{processor.device} in {processor.precision}"
    processes = f"{trainer.processes.world_size} process(es) of {torch.get_num_threads()} thread(s)"
    _LOG.info("Recipe %s, %d training images, %s, %s", what, len(trainer.data.train), where, processes)
    if trainer.resumed_from is not None:
        _LOG.info("Continuing from the checkpoint of step %d", trainer.resumed_from)
        tracker.log("tags", tags={"cifar.resumed_from_step": str(trainer.resumed_from)})
    for record in trainer.state.position.history:
        tracker.log(f"metrics of step {record.epoch + 1}", metrics=_measured(record), step=record.epoch + 1)


def _report_epoch(spec: JobSpec, record: EpochRecord, send: SendMessage, tracker: Tracker) -> None:
    epoch, epochs = record.epoch + 1, spec.recipe.epochs
    losses = f"train loss {record.train_loss:.4f}"
    if record.validation_loss is not None and record.validation_accuracy is not None:
        losses += (
            f", validation loss {record.validation_loss:.4f}, validation accuracy {record.validation_accuracy:.2%}"
        )
    speed = f"{record.images_per_second:.0f} images/s at {record.resolution} pixels, {record.seconds:.1f} s"
    _LOG.info("Epoch %d/%d: %s, %s", epoch, epochs, losses, speed)
    send({"type": "epoch", "epoch": epoch, "epochs": epochs, "seconds": record.seconds, **_measured(record)})
    tracker.log(f"metrics of step {epoch}", metrics=_measured(record), step=epoch)


def _measured(record: EpochRecord) -> dict[str, float]:
    """The metrics of a finished epoch, named as in Dagster and MLflow."""
    return record.model_dump(include=_EPOCH_METRICS, exclude_none=True)


def _publish(
    trainer: Trainer,
    network: PublishedNetwork,
    signing_key: str | None,
    send: SendMessage,
    tracker: Tracker,
    log: io.StringIO,
) -> dict[str, Any]:
    spec, models = trainer.spec, open_store(trainer.spec.output_uri)
    manifest, files = build_package(trainer, network)
    metrics = json.loads(files[METRICS_FILE])
    digest = manifest.digest
    uri = models.uri(f"{digest}/")
    _LOG.info("Test accuracy %.2f %%, model %s", 100 * metrics["test_accuracy"], uri)
    files[LOG_FILE] = log.getvalue().encode()
    write_package(models, manifest, files, signing_key)
    if spec.write_baseline_copies and trainer.data.manifest.is_cifar10:
        models.write(BASELINE_MODEL_KEY, baseline_copy_bytes(network))
    final = {name: metrics[name] for name in ("test_accuracy", "test_loss", "expected_calibration_error")}
    origin = {"model_digest": digest, "model_uri": uri, "dataset_digest": spec.dataset_digest}
    tracker.log("result", metrics=final, step=spec.recipe.epochs, tags=origin)
    tags = {**(spec.mlflow.tags if spec.mlflow else {}), **origin, "test_accuracy": f"{metrics['test_accuracy']:.4f}"}
    tracker.log_model({**files, MANIFEST_FILE: manifest.to_bytes()}, tags)
    unsent = tracker.close("FINISHED")
    performance = json.loads(models.read(f"{digest}/{PERFORMANCE_FILE}"))
    if performance.get("mlflow_unsent") != unsent:
        models.write(f"{digest}/{PERFORMANCE_FILE}", readable_json(performance | {"mlflow_unsent": unsent}))
    send(
        {
            "type": "result",
            "model_digest": digest,
            "model_uri": uri,
            "mlflow_run_id": tracker.run_id,
            "mlflow_model_version": tracker.model_version,
            "mlflow_unsent": unsent,
            "resumed_from": trainer.resumed_from,
        }
    )
    return metrics
