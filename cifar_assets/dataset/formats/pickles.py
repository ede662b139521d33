"""Reading the official archive's pickles without running what others may have put into one."""

import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

from cifar_assets.errors import DataError


class HostileDataError(DataError):
    """Data that tries to do more than hold images: to run code, or to write outside its folder."""


def load_plain(data: bytes, name: str) -> Any:
    """The object in a pickle made of numpy arrays, lists, dicts, numbers, text and bytes.

    Python 2 strings arrive as latin-1 text, as numpy asks for. Raises HostileDataError naming `name` when the pickle
    asks for anything else (nothing of it has run then), DataError when it is cut off or no pickle.
    """
    try:
        return _PlainUnpickler(io.BytesIO(data), encoding="latin1").load()
    except HostileDataError as error:
        raise HostileDataError(f"{name}: {error}") from error
    except Exception as error:
        raise DataError(f"{name} is no readable pickle of arrays and plain values: {error!r}") from error


class _PlainUnpickler(pickle._Unpickler):  # noqa: SLF001
    # The C unpickler allocates a memo as large as the pickle claims; this one keeps a dict.

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        admitted = _ADMITTED.get((module, name))
        if admitted is None:
            raise HostileDataError(
                f"the pickle asks for {module}.{name}; only numpy arrays and plain Python values are read. "
                "Do not use this file: write the batch again with numpy arrays and lists."
            )
        # A fresh callable each time: a pickle can set attributes on what it is given.
        return lambda *arguments: admitted(*arguments)


def _empty_array(kind: Any, shape: Any, typecode: Any) -> np.ndarray:
    # numpy pickles an array as an empty one plus its state.
    if kind is not np.ndarray or shape != (0,):
        raise HostileDataError(f"the pickle builds an array of kind {kind!r} and shape {shape!r} before its data")
    return np.ndarray(0, dtype=np.uint8)


def _dtype(kind: str, *_: Any) -> np.dtype:
    # A copy: the pickle then sets the byte order on it, and numpy's own dtypes are shared.
    dtype = np.dtype(kind, False, True)
    if dtype.kind not in "biufSUV":
        raise HostileDataError(f"the pickle holds an array of {kind!r}")
    return dtype


def _from_buffer(data: Any, dtype: np.dtype, shape: Any, order: Any, *_: Any) -> np.ndarray:
    return np.frombuffer(data, dtype=dtype).reshape(shape, order=order)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1" if encoding == "latin1" else "ascii")


def _byte_array(data: bytes | str = b"", *_: Any) -> bytearray:
    return bytearray(data.encode("latin1") if isinstance(data, str) else bytes(memoryview(data)))


_ADMITTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _encode,
}
for _module in ("builtins", "__builtin__"):
    _ADMITTED |= {
        (_module, "bytearray"): _byte_array,
        (_module, "complex"): complex,
        (_module, "frozenset"): frozenset,
        (_module, "set"): set,
    }
for _core in ("numpy.core", "numpy._core"):
    _ADMITTED |= {
        (f"{_core}.multiarray", "_reconstruct"): _empty_array,
        (f"{_core}.numeric", "_frombuffer"): _from_buffer,
    }
