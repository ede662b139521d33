"""One training job from its spec to a published model."""

import io
import json
import logging
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cifar_assets.contracts import CLASSES, SEED_MODEL_KEY
from cifar_assets.model_package import (
    CARD_FILE,
    ENVIRONMENT_FILE,
    IDENTITY_FILES,
    LOG_FILE,
    METRICS_FILE,
    ONNX_FILE,
    PERFORMANCE_FILE,
    RECIPE_FILE,
    WEIGHTS_FILE,
    ModelManifest,
    write_package,
)
from cifar_assets.training import distributed
from cifar_assets.training.checkpoint import CheckpointStore
from cifar_assets.training.data import TrainingData, open_data
from cifar_assets.training.device import Processor, choose_processor, use_repeatable_kernels, use_threads
from cifar_assets.training.distributed import Processes
from cifar_assets.training.environment import describe_environment
from cifar_assets.training.evaluate import measure, predict
from cifar_assets.training.export import onnx_bytes, onnx_difference, seed_copy_bytes, weights_bytes
from cifar_assets.training.loop import Trainer
from cifar_assets.training.messages import Messages
from cifar_assets.training.networks import Classifier
from cifar_assets.training.report import build_metrics, build_performance, model_card
from cifar_assets.training.spec import JobSpec
from cifar_assets.training.state import EpochRecord
from cifar_assets.training.stopping import PeerLostError, StopSignal, TrainingStopped
from cifar_assets.training.tracking import RunStatus, Tracker
from resources.digests import canonical_json, sha256_bytes
from resources.errors import StoreError
from resources.object_store import ObjectStore, open_store

_LOG = logging.getLogger(__name__)
_ONNX_IMAGES = 256
_STOP_PATIENCE_SECONDS = 8.0
"""Kubernetes kills thirty seconds after SIGTERM: the checkpoint comes first, MLflow gets a part of what is left."""
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class TrainedModel:
    """What a job came to."""

    digest: str
    uri: str
    metrics: dict[str, Any]
    mlflow_unsent: list[str]


def run_job(spec: JobSpec, stop: StopSignal, messages: Messages, log: io.StringIO) -> TrainedModel | None:
    """Train what the spec says and publish it. Returns None on processes other than rank 0.

    Args:
        spec: the job.
        stop: takes over the signals once the processes have met.
        messages: tells Dagster.
        log: has the log so far; its content is stored with the model.

    Raises TrainingStopped when told to stop or when the store is not reached, PeerLostError when another process went
    away, ConfigError and DataError for what a person must put right.
    """
    processes = distributed.read_processes()
    use_threads(spec.execution)
    processor = choose_processor(spec.execution, spec.recipe.precision, processes.local_rank)
    use_repeatable_kernels(processor.device)
    with distributed.noticing_lost_peers(processes):
        distributed.join(processes, processor.device)
    # until here there is nothing to save, and a signal may end a process that waits for others
    stop.install()
    tracker = Tracker(spec.mlflow if processes.is_first else None, spec.identity)
    status: RunStatus = "FAILED"
    patience: float | None = None
    try:
        tracker.start(_parameters(spec))
        with distributed.noticing_lost_peers(processes):
            model = _Job(spec, stop, messages, tracker, processor, processes, log).run()
        status = "FINISHED"
        return model
    except PeerLostError:
        raise  # as FAILED: nobody stopped it
    except TrainingStopped:
        status, patience = "KILLED", _STOP_PATIENCE_SECONDS
        raise
    except StoreError as error:
        if not error.transient:
            raise
        raise TrainingStopped(f"{error} Start the same spec again to continue from the last checkpoint.") from error
    finally:
        if status != "FINISHED":
            tracker.close(status, patience)
        distributed.leave(processes)


def clear_checkpoints(spec: JobSpec) -> None:
    """Remove a finished job's checkpoints. A restart needs them until Dagster was told of the model."""
    try:
        _checkpoints(spec).clear()
    except StoreError as error:
        _LOG.warning("Checkpoints are left behind: %s", error)


def _checkpoints(spec: JobSpec) -> CheckpointStore:
    folder = open_store(spec.output_uri).at(f"{CHECKPOINTS}/{spec.identity}")
    return CheckpointStore(folder, spec.execution.keep_checkpoints)


class _Job:
    def __init__(
        self,
        spec: JobSpec,
        stop: StopSignal,
        messages: Messages,
        tracker: Tracker,
        processor: Processor,
        processes: Processes,
        log: io.StringIO,
    ):
        self._spec = spec
        self._stop = stop
        self._messages = messages
        self._tracker = tracker
        self._processor = processor
        self._processes = processes
        self._log = log
        self._run_told = False

    def run(self) -> TrainedModel | None:
        before = time.perf_counter()
        models = open_store(self._spec.output_uri)
        checkpoints = _checkpoints(self._spec)
        data = open_data(self._spec, self._processor.device)
        trainer = Trainer(self._spec, data, self._processor, self._processes, checkpoints, self._stop)
        trainer.phases.add("start", before)
        self._announce(trainer, data)
        trainer.train(self._tell_run, self._tell_epoch)
        network = trainer.published()
        if not self._processes.is_first:
            return None
        recipe = self._spec.recipe
        classifier = Classifier(network, data.manifest.mean, data.manifest.std, recipe.views).eval()
        files, manifest = self._package(trainer, data, classifier.to(self._processor.device))
        return self._publish(models, manifest, files, classifier)

    def _announce(self, trainer: Trainer, data: TrainingData) -> None:
        recipe = self._spec.recipe
        _LOG.info(
            "Recipe %s (%s, %d epochs), seed %d, %d training images, %s in %s, %d process(es) of %d thread(s)",
            recipe.name,
            recipe.network,
            recipe.epochs,
            self._spec.seed,
            len(data.train),
            self._processor.device,
            str(self._processor.dtype).removeprefix("torch."),
            self._processes.count,
            torch.get_num_threads(),
        )
        if trainer.resumed_from is not None:
            _LOG.info("Continuing from the checkpoint of step %d", trainer.resumed_from)
            self._tracker.set_tags({"cifar.resumed_from_step": str(trainer.resumed_from)})
        for record in trainer.state.position.history:
            self._track_epoch(record)

    def _tell_run(self) -> None:
        if self._run_told or self._tracker.run_id is None:
            return
        self._run_told = True
        self._messages.send("mlflow_run", run_id=self._tracker.run_id, experiment_id=self._tracker.experiment_id)

    def _tell_epoch(self, record: EpochRecord) -> None:
        epochs = self._spec.recipe.epochs
        _LOG.info(
            "Epoch %d/%d: train loss %.4f%s, %.0f images/s at %d pixels, %.1f s",
            record.epoch + 1,
            epochs,
            record.train_loss,
            _validation(record),
            record.images_per_second,
            record.resolution,
            record.seconds,
        )
        self._messages.send(
            "epoch",
            epoch=record.epoch + 1,
            epochs=epochs,
            seconds=record.seconds,
            **_measured(record),
        )
        self._track_epoch(record)

    def _track_epoch(self, record: EpochRecord) -> None:
        self._tracker.log_metrics(_measured(record), record.epoch + 1)

    def _package(
        self, trainer: Trainer, data: TrainingData, classifier: Classifier
    ) -> tuple[dict[str, bytes], ModelManifest]:
        """The files of the model package and the manifest that names it."""
        before = time.perf_counter()
        test = measure(predict(classifier, data.test, self._processor), data.test.labels.cpu().numpy())
        validation_logits = predict(classifier, data.validation, self._processor)
        validation = measure(validation_logits, data.validation.labels.cpu().numpy())
        before = trainer.phases.add("test", before)
        held_out = np.arange(min(_ONNX_IMAGES, len(data.validation)))
        images = data.validation.images(held_out)
        with torch.inference_mode():
            logits = classifier(images).cpu().numpy()
        weights, onnx = weights_bytes(classifier), onnx_bytes(classifier)
        extra = {
            "train_images": len(data.train),
            "parameters": sum(parameter.numel() for parameter in classifier.parameters()),
            "onnx_max_difference": onnx_difference(onnx, images.cpu().numpy(), logits),
            "onnx_largest_logit": float(np.abs(logits).max()),
            "onnx_images": len(held_out),
        }
        trainer.phases.add("export", before)
        history = trainer.state.position.history
        metrics = build_metrics(self._spec, data.manifest.raw_digest, test, validation, history, extra)
        performance = build_performance(trainer.phases.seconds, history, trainer.resumed_from, len(data.train))
        environment = describe_environment(self._processor, self._processes)
        files = {
            WEIGHTS_FILE: weights,
            ONNX_FILE: onnx,
            METRICS_FILE: canonical_json(metrics),
            RECIPE_FILE: canonical_json(self._spec.recipe.model_dump(mode="json")),
            PERFORMANCE_FILE: _readable_json(performance),
            ENVIRONMENT_FILE: _readable_json(environment),
            CARD_FILE: model_card(self._spec, metrics, performance, environment).encode(),
        }
        manifest = ModelManifest(
            dataset_digest=self._spec.dataset_digest,
            raw_digest=data.manifest.raw_digest,
            seed=self._spec.seed,
            classes=CLASSES,
            files={name: sha256_bytes(files[name]) for name in IDENTITY_FILES},
        )
        return files, manifest

    def _publish(
        self, models: ObjectStore, manifest: ModelManifest, files: dict[str, bytes], classifier: Classifier
    ) -> TrainedModel:
        metrics = json.loads(files[METRICS_FILE])
        digest = manifest.digest
        uri = models.uri(f"{digest}/")
        _LOG.info("Test accuracy %.2f %%, model %s", 100 * metrics["test_accuracy"], uri)
        files[LOG_FILE] = self._log.getvalue().encode()
        write_package(models, manifest, files)
        if self._spec.write_seed_copies:
            models.write(SEED_MODEL_KEY, seed_copy_bytes(classifier))
        self._tracker.log_metrics(
            {name: metrics[name] for name in ("test_accuracy", "test_loss", "expected_calibration_error")},
            self._spec.recipe.epochs,
        )
        tags = {
            **(self._spec.mlflow.tags if self._spec.mlflow else {}),
            "model_digest": digest,
            "model_uri": uri,
            "dataset_digest": self._spec.dataset_digest,
            "test_accuracy": f"{metrics['test_accuracy']:.4f}",
        }
        self._tracker.set_tags({"model_digest": digest, "model_uri": uri, "dataset_digest": self._spec.dataset_digest})
        self._tracker.log_files({**files, "manifest.json": manifest.to_bytes()}, "model")
        self._tracker.register("model", tags)
        unsent = self._tracker.close("FINISHED")
        performance = json.loads(models.read(f"{digest}/{PERFORMANCE_FILE}"))
        if performance.get("mlflow_unsent") != unsent:
            models.write(f"{digest}/{PERFORMANCE_FILE}", _readable_json(performance | {"mlflow_unsent": unsent}))
        self._tell_run()
        self._messages.send(
            "result",
            model_digest=digest,
            model_uri=uri,
            mlflow_run_id=self._tracker.run_id,
            mlflow_model_version=self._tracker.model_version,
            mlflow_unsent=unsent,
            resumed_from=json.loads(files[PERFORMANCE_FILE])["resumed_from_step"],
        )
        return TrainedModel(digest, uri, metrics, unsent)


def _measured(record: EpochRecord) -> dict[str, float]:
    """What a finished epoch measured, by the names of Dagster's and MLflow's metrics."""
    values = {
        "train_loss": record.train_loss,
        "validation_loss": record.validation_loss,
        "validation_accuracy": record.validation_accuracy,
        "images_per_second": record.images_per_second,
        "learning_rate": record.learning_rate,
    }
    return {name: value for name, value in values.items() if value is not None}


def _validation(record: EpochRecord) -> str:
    if record.validation_loss is None or record.validation_accuracy is None:
        return ""
    return f", validation loss {record.validation_loss:.4f}, validation accuracy {record.validation_accuracy:.2%}"


def _parameters(spec: JobSpec) -> dict[str, object]:
    recipe = {f"recipe.{name}": value for name, value in spec.recipe.model_dump(mode="json").items()}
    return {**recipe, "seed": spec.seed, "dataset_digest": spec.dataset_digest}


def _readable_json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True).encode()
