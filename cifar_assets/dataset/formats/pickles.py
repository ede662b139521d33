"""Reads the official archive's pickles as plain data, without creating any object that a file could control.

A pickle gets stand-ins defined here for the few names that arrays need, and a checked `np.frombuffer` builds the array
from its values. The process that reads a pickle limits its cost.
"""

import io
import math
import pickle
import pickletools
import re
from typing import Any

import numpy as np

from resources.errors import DataError


def load_fields(data: bytes, name: str) -> dict[str, Any]:
    """The pickled dict: lists, dicts, tuples, numbers, text, bytes, and as top-level values arrays of numbers and text.

    Python 2 strings are decoded as latin-1 text. Raises DataError naming `name` when the pickle contains anything else,
    is truncated, not a pickle or not a dict.
    """
    try:
        _check_claims(data)
        loaded = _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()
        if not isinstance(loaded, dict):
            raise DataError(f"expected a dict, got a {type(loaded).__name__}")
        return {_text(key): value.array if isinstance(value, _Array) else value for key, value in loaded.items()}
    except MemoryError:
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, DataError) else repr(error)
        raise DataError(f"{name} is not a readable pickle of arrays and plain values: {reason:.300}") from error


def _check_claims(data: bytes) -> None:
    """Reject lengths and memo positions beyond the data, for which the unpickler would allocate memory."""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(data):
            raise ValueError("a memo larger than the pickle")


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("latin1")
    if not isinstance(value, str):
        raise DataError(f"expected text as key, got a {type(value).__name__}")
    return value


class _StandIn:
    """Blocks all that a pickle can do with an instance or its class: BUILD calls `__setstate__`, which sets nothing."""

    def __setstate__(self, state: Any) -> None:
        raise DataError("the pickle sets the state of an object that has none")


class _Dtype(_StandIn):
    """Stand-in for numpy.dtype."""

    def __init__(self, kind: Any, *_: Any):
        if not isinstance(kind, str) or not re.fullmatch("[biufcSU][0-9]{1,4}", kind):
            raise DataError(f"the pickle holds an array of {kind!r:.50}; only numbers and text are read")
        self.kind, self.byte_order = kind, "="

    def __setstate__(self, state: Any) -> None:
        self.byte_order = {"|": "=", "=": "=", "<": "<", ">": ">"}[state[1]]


class _Array(_StandIn):
    """Stand-in for numpy.ndarray, and for the function that makes an empty one to be filled by BUILD."""

    array: np.ndarray | None = None

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, data = state
        self.fill(data, dtype, shape, "F" if is_fortran else "C")

    def fill(self, data: Any, dtype: Any, shape: Any, order: Any) -> None:
        kind = np.dtype(dtype.byte_order + dtype.kind)
        data = data.encode("latin1") if isinstance(data, str) else data
        if not isinstance(data, bytes | bytearray) or not all(type(side) is int and side >= 0 for side in shape):
            raise ValueError("an array without data or shape")
        if math.prod(shape) * kind.itemsize != len(data):
            raise ValueError(f"an array of {len(data)} bytes that declares another size")
        self.array = np.frombuffer(data, dtype=kind).reshape(shape, order=order)


class _Buffer(_Array):
    """Stand-in for the function that makes an array from a buffer."""

    def __init__(self, *parts: Any):
        self.fill(*parts)


class _Encoded(_StandIn):
    """Stand-in for the functions that make bytes."""

    def __new__(cls, text: str = "", encoding: str = "latin1") -> Any:
        return text.encode("latin1" if encoding == "latin1" else "ascii")


_ADMITTED: dict[tuple[str, str], type[_StandIn]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.numeric", "_frombuffer"): _Buffer,
    ("numpy._core.numeric", "_frombuffer"): _Buffer,
    ("_codecs", "encode"): _Encoded,
    ("__builtin__", "bytes"): _Encoded,
}
"""The names a pickle may use, and what they resolve to. No other callable ever gets onto its stack."""


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        admitted = _ADMITTED.get((module_name, global_name))
        if admitted is None:
            raise DataError(
                f"the pickle contains {module_name}.{global_name}; only numpy arrays and plain Python values are read. "
                "Do not use this file: write the batch again with numpy arrays and lists."
            )
        return admitted
