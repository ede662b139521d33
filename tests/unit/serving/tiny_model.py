"""A small deterministic model of the stored form, for tests of everything around it."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cifar_assets.contracts import CLASSES
from cifar_assets.model_package import (
    INT8_FILE,
    METRICS_FILE,
    ONNX_FILE,
    RECIPE_FILE,
    WEIGHTS_FILE,
    ModelManifest,
    write_package,
)
from resources.digests import sha256_bytes
from resources.object_store import ObjectStore


def tiny_weights(seed: int = 0) -> np.ndarray:
    """Weights (48, 10) of a linear model over 4x4 average-pooled pixels in 0..1."""
    return np.random.default_rng(seed).normal(0, 2, size=(48, 10)).astype(np.float32)


def tiny_logits(images: np.ndarray, seed: int = 0) -> np.ndarray:
    """The model's answer, computed with numpy. images: uint8 (N, 3, 32, 32)."""
    pooled = images.astype(np.float64).reshape(-1, 3, 4, 8, 4, 8).mean(axis=(3, 5)) / 255
    return pooled.reshape(len(images), 48) @ tiny_weights(seed).astype(np.float64)


def tiny_onnx(seed: int = 0, *, bias: float = 0.0, breaks_on_white: bool = False) -> bytes:
    """images uint8 [N,3,32,32] -> cast, scale, average pooling, matmul -> logits float32 [N,10].

    With `breaks_on_white` the answer to a picture with a white area is not finite.
    """
    weights = numpy_helper.from_array(tiny_weights(seed), "weights")
    scale = numpy_helper.from_array(np.array(1e38 if breaks_on_white else 1 / 255, dtype=np.float32), "scale")
    shift = numpy_helper.from_array(np.array(bias, dtype=np.float32), "shift")
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "scale"], ["scaled"]),
        helper.make_node("AveragePool", ["scaled"], ["pooled"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
        helper.make_node("MatMul", ["features", "weights"], ["product"]),
        helper.make_node("Add", ["product", "shift"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", 3, 32, 32])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])],
        [weights, scale, shift],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def store_tiny_model(
    models: ObjectStore,
    seed: int = 0,
    *,
    onnx_bytes: bytes | None = None,
    int8: bytes | None = None,
    dataset: str = "d" * 64,
) -> tuple[str, str]:
    """Store a package; returns its URI and digest. `int8` is its int8 model, if it has one."""
    files = {
        WEIGHTS_FILE: tiny_weights(seed).tobytes(),
        ONNX_FILE: tiny_onnx(seed) if onnx_bytes is None else onnx_bytes,
        METRICS_FILE: b'{"test_accuracy":0.9}',
        RECIPE_FILE: b'{"name":"tiny"}',
        **({} if int8 is None else {INT8_FILE: int8}),
    }
    manifest = ModelManifest(
        dataset_digest=dataset,
        raw_digest="e" * 64,
        seed=seed,
        classes=CLASSES,
        files={name: sha256_bytes(data) for name, data in files.items()},
    )
    digest = write_package(models, manifest, files)
    return models.at(digest).uri(), digest
