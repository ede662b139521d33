"""Reading the official archive's pickles: plain data comes out, and nothing that a file could drive is ever made.

The unpickler makes no numpy object. Stand-ins written here take what a pickle says of an array, and one checked
`np.frombuffer` makes the array from it.
"""

import io
import math
import pickle
import re
import struct
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from resources.errors import DataError


class HostileDataError(DataError):
    """Data that tries to do more than hold images: to run code, or to write outside its folder."""


def load_fields(data: bytes, name: str) -> dict[str, Any]:
    """The pickled dict: lists, dicts, tuples, numbers, text, bytes, and in its own values arrays of numbers and text.

    Python 2 strings arrive as latin-1 text. Raises HostileDataError naming `name` when the pickle asks for anything
    else, DataError when it is cut off, not a pickle or not a dict.
    """
    try:
        loaded = _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()
        if not isinstance(loaded, dict):
            raise DataError(f"expected a dict, got a {type(loaded).__name__}")
        return {_text(key): value.array if isinstance(value, _Array) else value for key, value in loaded.items()}
    except HostileDataError as error:
        raise HostileDataError(f"{name}: {error}") from error
    except MemoryError:
        raise
    except Exception as error:
        raise DataError(f"{name} is not a readable pickle of arrays and plain values: {error!r:.200}") from error


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("latin1")
    if not isinstance(value, str):
        raise DataError(f"expected text as key, got a {type(value).__name__}")
    return value


class _Dtype:
    """Stands for numpy.dtype."""

    def __init__(self, kind: Any, *_: Any):
        if not isinstance(kind, str) or not re.fullmatch("[biufcSU][0-9]{1,4}", kind):
            raise HostileDataError(f"the pickle holds an array of {kind!r:.50}; only numbers and text are read")
        self.kind, self.byte_order = kind, "="

    def set_state(self, state: Any) -> None:
        self.byte_order = {"|": "=", "=": "=", "<": "<", ">": ">"}[state[1]]


class _Array:
    """Stands for numpy.ndarray."""

    array: np.ndarray | None = None

    def set_state(self, state: Any) -> None:
        _, shape, dtype, is_fortran, data = state
        self.fill(data, dtype, shape, "F" if is_fortran else "C")

    def fill(self, data: Any, dtype: Any, shape: Any, order: Any) -> "_Array":
        kind = np.dtype(dtype.byte_order + dtype.kind)
        data = data.encode("latin1") if isinstance(data, str) else data
        if not isinstance(data, bytes) or not all(type(side) is int and side >= 0 for side in shape):
            raise ValueError("an array without data or shape")
        if math.prod(shape) * kind.itemsize != len(data):
            raise ValueError(f"an array of {len(data)} bytes that claims another size")
        self.array = np.frombuffer(data, dtype=kind).reshape(shape, order=order)
        return self


class _Dict(dict[Any, Any]):
    """Its keys are text, bytes or numbers: the hash of nested tuples may take forever."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if not isinstance(key, str | bytes | int):
            raise ValueError("a dict with keys that are not text, bytes or numbers")
        super().__setitem__(key, value)


def _reconstruct(kind: Any, shape: Any, typecode: Any) -> _Array:
    if kind is not _new_array:
        raise HostileDataError("the pickle builds an array of a class of its own")
    return _Array()


def _new_array(*_: Any) -> None:
    raise HostileDataError("the pickle builds an array without its bytes")


def _encode(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1" if encoding == "latin1" else "ascii")


_ADMITTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _new_array,
    ("numpy", "dtype"): lambda *state: _Dtype(*state),
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): lambda: b"",
}
"""What a pickle may name, and what is called in its place. Nothing else that can be called ever is on its stack."""
for _core in ("numpy.core", "numpy._core"):
    _ADMITTED |= {
        (f"{_core}.multiarray", "_reconstruct"): _reconstruct,
        (f"{_core}.numeric", "_frombuffer"): lambda *parts: _Array().fill(*parts),
    }

_UNPICKLER: Any = pickle._Unpickler  # noqa: SLF001
# The C unpickler allocates a memo as large as the pickle claims; this one keeps a dict.

_REFUSED_OPCODES = [
    *(pickle.OBJ, pickle.INST, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.PERSID, pickle.BINPERSID),
    *(pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
    *(pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET),
]


class _PlainUnpickler(_UNPICKLER):
    stack: Any

    def find_class(self, module: str, name: str) -> Any:
        admitted = _ADMITTED.get((module, name))
        if admitted is None:
            raise HostileDataError(
                f"the pickle asks for {module}.{name}; only numpy arrays and plain Python values are read. "
                "Do not use this file: write the batch again with numpy arrays and lists."
            )
        return admitted

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        if not callable(self.stack[-1]):
            raise HostileDataError("the pickle calls what is not a function")
        self.stack[-1] = self.stack[-1](*arguments)

    def load_build(self) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], _Array | _Dtype):
            raise HostileDataError("the pickle sets the state of what has none")
        self.stack[-1].set_state(state)

    def load_empty_dictionary(self) -> None:
        self.append(_Dict())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append(_Dict())
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][key] = value

    def load_bytearray8(self) -> None:
        # The original allocates the length that the pickle claims.
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(size))

    def load_refused(self) -> None:
        raise HostileDataError("the pickle builds an object of a class of its own, or a set")

    dispatch: ClassVar[dict[int, Any]] = {
        **_UNPICKLER.dispatch,
        **dict.fromkeys((opcode[0] for opcode in _REFUSED_OPCODES), load_refused),
        pickle.REDUCE[0]: load_reduce,
        pickle.BUILD[0]: load_build,
        pickle.EMPTY_DICT[0]: load_empty_dictionary,
        pickle.DICT[0]: load_dict,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }
