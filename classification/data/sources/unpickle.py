"""Reading a pickle from anywhere without running what it says.

A pickle is a program: `pickle.load` calls whatever it names. Here it may build dicts, lists, tuples, numbers, text and
arrays of whole numbers; to anything else it names, the answer is a UserError before a call is made.
"""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from erase_sd.common.errors import UserError

# What a damaged pickle makes the unpickler raise, next to its own error.
DAMAGE = (EOFError, ValueError, TypeError, LookupError, AttributeError, MemoryError, OverflowError, struct.error)


class _Dtype:
    """Stands in for numpy.dtype, whose own state a pickle could set to anything: a size in bytes and a byte order."""

    def __init__(self, name: str | bytes, *_: object) -> None:
        self.dtype = np.dtype(name)
        if self.dtype.kind not in "iu":
            raise pickle.UnpicklingError(f"it holds an array of {self.dtype}")

    def __setstate__(self, state: tuple) -> None:
        order = state[1].decode() if isinstance(state[1], bytes) else state[1]
        self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands in for numpy.ndarray: its state is (version, shape, dtype, whether column-major, bytes)."""

    def __init__(self, *_: object) -> None:
        """Ignore what `_reconstruct` passes: a type, an empty shape and a typecode."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        self.array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if fortran else "C")


def _from_buffer(data: bytes | bytearray, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    """Stand in for numpy's _frombuffer, by which protocol 5 writes an array: its bytes, type, shape and order."""
    array = _Array()
    array.array = np.frombuffer(data, dtype.dtype).reshape(shape, order=order)
    return array


# All that pickled arrays, and bytes in Python 3's protocol 2, ask for.
STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,  # as numpy 2 calls it
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("numpy", "ndarray"): None,  # an argument of the above
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): bytes,  # of a text and an encoding
}


class _Unpickler(pickle._Unpickler):
    """Looks every global up among the stand-ins.

    Python's own unpickler rather than its C twin, which makes room for any number that a memo entry claims to have.
    """

    dispatch: ClassVar[dict] = dict(pickle._Unpickler.dispatch)

    def load_bytearray8(self) -> None:
        """Read a bytearray of protocol 5, without making room for more than the file has."""
        (size,) = struct.unpack("<Q", self.read(8))
        data = self.read(size)
        if len(data) != size:
            raise pickle.UnpicklingError("pickle data was truncated")
        self.append(bytearray(data))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is code and not data")
        return STAND_INS[module, name]


def unpickle(path: Path) -> dict[str, Any]:
    """Return the dict in a pickle of Python 2 or 3, protocols 0 to 5, its keys as text.

    Raises UserError for anything else, hostile or damaged.
    """
    try:
        content = _Unpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        if not isinstance(content, dict):
            raise pickle.UnpicklingError(f"it holds a {type(content).__name__} and not a dict")
        found = {}
        for key, value in content.items():
            found[text(key)] = value.array if isinstance(value, _Array) else value
        return found
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} was not loaded: {error}; get the original file again") from error
    except DAMAGE as error:
        raise UserError(f"{path} is damaged or no pickle ({error}): get the original file again") from error


def text(key: object) -> str:
    """Return a name in a pickle as text: Python 2 wrote bytes."""
    return key.decode("latin1") if isinstance(key, bytes) else str(key)
