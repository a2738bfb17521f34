"""Reading a pickle from anywhere without running what it says.

A pickle is a program: `pickle.load` calls whatever it names. Here it may build dicts, lists, tuples, numbers, text and
arrays of whole numbers; to anything else it names, the answer is a UserError before a call is made.
"""

from __future__ import annotations

import io
import pickle
import struct
from pathlib import Path
from typing import Any

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
        """`_reconstruct` passes a type, an empty shape and a typecode, all without use."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        self.array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if fortran else "C")


# All that pickled arrays, and bytes in Python 3's protocol 2, ask for.
STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,  # as numpy 2 calls it
    ("numpy", "ndarray"): None,  # an argument of the above
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): bytes,  # of a text and an encoding
}


class _Unpickler(pickle._Unpickler):
    """Looks every global up among the stand-ins.

    Python's own unpickler rather than its C twin, which makes room for any number that a memo entry claims to have.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is code and not data")
        return STAND_INS[module, name]


def unpickle(path: Path) -> dict[str, Any]:
    """The dict in a pickle of Python 2 or 3, its keys as text. UserError for anything else, hostile or damaged."""
    try:
        content = _Unpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        if not isinstance(content, dict):
            raise pickle.UnpicklingError(f"it holds a {type(content).__name__} and not a dict")
        return {_text(key): value.array if isinstance(value, _Array) else value for key, value in content.items()}
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} was not loaded: {error}; get the original file again") from error
    except DAMAGE as error:
        raise UserError(f"{path} is damaged or no pickle ({error}): get the original file again") from error


def _text(key: object) -> str:
    """A key as text: Python 2 wrote bytes."""
    return key.decode("latin1") if isinstance(key, bytes) else str(key)
