"""The stored model, verified and loaded into ONNX Runtime."""

import logging
import math
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from cifar_assets.contracts import MODEL_INPUT, MODEL_OUTPUT
from cifar_assets.cpus import available_cpus
from cifar_assets.model_package import (
    SERVED_FILES,
    ModelManifest,
    ServedPrecision,
    read_file,
    read_manifest,
    verify_package,
)
from resources.errors import DataError
from resources.object_store import open_store

if TYPE_CHECKING:  # Dagster's image, which also runs models, has no HTTP server
    from cifar_assets.serving.answers import Images, Logits

_log = logging.getLogger(__name__)


class Classifier:
    """Runs the ONNX graph: uint8 (N, 3, size, size) to float32 logits (N, number of classes)."""

    def __init__(
        self, onnx: bytes, manifest: ModelManifest, *, num_threads: int | None = None, source: str = "the ONNX model"
    ):
        self.manifest = manifest
        self.num_threads = num_threads or math.ceil(available_cpus())
        try:
            self._session = _session(onnx, self.num_threads)
            self._narrow_session = self._session if self.num_threads == 1 else _session(onnx, 1)
        except Exception as error:  # onnxruntime's exceptions share no base class but Exception
            raise DataError(f"{source} does not load in ONNX Runtime: {error}") from error
        found = [
            (tensor.name, tensor.type, [size if isinstance(size, int) else "N" for size in tensor.shape])
            for tensor in (*self._session.get_inputs(), *self._session.get_outputs())
        ]
        expected = [
            (MODEL_INPUT, "tensor(uint8)", ["N", *manifest.image_shape]),
            (MODEL_OUTPUT, "tensor(float)", ["N", len(manifest.classes)]),
        ]
        if found != expected:
            raise DataError(f"{source}: expected inputs and outputs {expected}, got {found}. Export the model again.")

    def run(self, images: "Images", is_alone: bool = True) -> "Logits":
        """Logits of the images, computed by all threads, or by the calling one while others run the model too."""
        session = self._session if is_alone else self._narrow_session
        (logits,) = session.run([MODEL_OUTPUT], {MODEL_INPUT: images})
        return np.asarray(logits, dtype=np.float32)

    def warm_up(self, batch_images: int) -> None:
        """Run all batch sizes once, so that no client pays for the first run. Raises DataError."""
        for size, is_alone in dict.fromkeys(((1, True), (batch_images, True), (batch_images, False))):
            logits = self.run(np.zeros((size, *self.manifest.image_shape), dtype=np.uint8), is_alone)
            finite = bool(np.isfinite(logits).all())
            if logits.shape != (size, len(self.manifest.classes)) or not finite:
                received = f"values of shape {logits.shape}, all finite: {finite}"
                raise DataError(f"For {size} black images the model returned {received}. Train or export it again.")


def softmax(logits: "Logits") -> NDArray[np.float64]:
    """Probabilities of each row, in float64 so that a row sums to one."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def _session(onnx: bytes, num_threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1
    # Idle threads that spin eat the CPU quota of a small pod.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])


def load_classifier(
    model_uri: str,
    model_digest: str,
    precision: ServedPrecision = "float32",
    *,
    public_key: str = "",
    num_threads: int | None,
    batch_images: int,
) -> Classifier:
    """Load the package's model of that precision if it has the digest and the key's signature, and warm it up.

    Raises IntegrityError for other content, ConfigError for a value that is not a key, ObjectNotFoundError if there is
    none, DataError for a model that cannot be served, StoreError when the store does not respond.
    """
    package = open_store(model_uri)
    manifest = read_manifest(package, model_digest)
    if public_key:
        verify_package(package, model_digest, public_key)
    name = SERVED_FILES[precision]
    if name not in manifest.files:
        raise DataError(f"Model {model_digest} at {model_uri} has no {name}. Serve it with --precision=float32.")
    onnx = read_file(package, manifest, name)
    classifier = Classifier(onnx, manifest, num_threads=num_threads, source=package.uri(name))
    classifier.warm_up(batch_images)
    _log.info("Loaded and verified %s of model %s from %s", name, model_digest, model_uri)
    return classifier
