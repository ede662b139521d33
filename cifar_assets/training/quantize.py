"""The int8 model: the exported ONNX model with 8-bit convolutions, in ONNX Runtime's QDQ format."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType
from onnxruntime.quantization.calibrate import TensorsData

from cifar_assets.contracts import MODEL_INPUT

_OPERATORS = ["Conv", "MaxPool"]
_BATCH = 64


def int8_bytes(model: bytes, images: NDArray[np.uint8], num_threads: int) -> bytes:
    """The ONNX model with int8 weights, scaled per output channel, and uint8 activations, scaled to the images' range.

    The same model and images give the same bytes. Normalization, the first convolution and the head stay in float32:
    they take little time. Weights use 7 bits, because processors without VNNI instructions saturate the sum of two
    products to 16 bits: with 8 bits, a server on such a processor would predict differently than the trainer measured.
    """
    proto = onnx.shape_inference.infer_shapes(onnx.load_from_string(model))
    nodes = [node for node in proto.graph.node if node.op_type in _OPERATORS]
    first = next(node for node in nodes if node.op_type == "Conv")
    weights = {tensor.name for tensor in proto.graph.initializer}
    tensors = {name: None for node in nodes for name in (*node.input, *node.output) if name not in weights}
    quantizer = QDQQuantizer(
        proto,
        per_channel=True,
        reduce_range=True,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, _ranges(proto, list(tensors), images, num_threads)),
        nodes_to_quantize=[],
        nodes_to_exclude=[first.name],
        op_types_to_quantize=_OPERATORS,
        extra_options={},
    )
    quantizer.quantize_model()
    return quantizer.model.model.SerializeToString()


def open_session(model: bytes, num_threads: int) -> onnxruntime.InferenceSession:
    """The model in ONNX Runtime, which by default has a thread for every CPU of the machine, even in a small pod."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _ranges(
    proto: onnx.ModelProto, tensors: Sequence[str], images: NDArray[np.uint8], num_threads: int
) -> dict[str, Any]:
    """Smallest and largest value of each tensor over the images, the format of ONNX Runtime's own calibration.

    That one sets no number of threads.
    """
    probe = copy.deepcopy(proto)
    probe.graph.ClearField("output")
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in tensors)
    session = open_session(probe.SerializeToString(), num_threads)
    lowest, highest = [], []
    for start in range(0, len(images), _BATCH):
        values: Any = session.run(tensors, {MODEL_INPUT: images[start : start + _BATCH]})
        lowest.append([each.min() for each in values])
        highest.append([each.max() for each in values])
    ranges = zip(np.min(lowest, axis=0), np.max(highest, axis=0), strict=True)
    return dict(zip(tensors, ranges, strict=True))
