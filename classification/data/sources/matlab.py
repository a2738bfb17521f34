"""MATLAB files of version 5, as far as they hold arrays of real numbers.

scipy.io.loadmat reads them too, but some damaged files make scipy 1.17 write where it should not and end the process.
Format: https://www.mathworks.com/help/pdf_doc/matlab/matfile_format.pdf
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from erase_sd.common.errors import UserError

HEADER = 128  # bytes: text, a version, "MI" as this machine's byte order has it
VERSION = 0x0100
MATRIX, COMPRESSED = 14, 15  # types of elements, next to those of numbers
STORED = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
MEANT = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
COMPLEX = 0x0800
LARGEST = 2**30  # bytes of an element once it is uncompressed; SVHN's largest has 225 million


def read(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a file by name. UserError if it is damaged, another format, or holds anything but real numbers."""
    data = memoryview(path.read_bytes())
    try:
        order = {b"IM": "<", b"MI": ">"}[bytes(data[HEADER - 2 : HEADER])]
        if struct.unpack_from(f"{order}H", data, HEADER - 4) != (VERSION,):
            raise ValueError("it is not of version 5")
        return dict(_matrix(body, order) for body in _matrices(data[HEADER:], order))
    except (ValueError, TypeError, KeyError, struct.error, zlib.error) as error:
        raise UserError(f"{path} is damaged or no MATLAB 5 file ({error}): get the original file again") from error


def _matrices(data: memoryview, order: str) -> Iterator[memoryview]:
    for kind, body in _elements(data, order):
        for inner, content in _elements(_inflated(body), order) if kind == COMPRESSED else [(kind, body)]:
            if inner != MATRIX:
                raise ValueError(f"it has an element of type {inner}")
            yield content


def _inflated(body: memoryview) -> memoryview:
    inflate = zlib.decompressobj()
    data = inflate.decompress(body, LARGEST)
    if not inflate.eof:
        raise ValueError("a compressed part ends early or is too large")
    return memoryview(data)


def _elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """(type, bytes) of each: two words of tag, or half a tag with up to 4 bytes where the second word would be."""
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from(f"{order}II", data, at)
        start = at + 8
        if kind >> 16:
            kind, size, start = kind & 0xFFFF, min(kind >> 16, 4), at + 4
        if start + size > len(data):
            raise ValueError("it ends early")
        yield kind, data[start : start + size]
        at = start + size if kind == COMPRESSED else -(-(start + size) // 8) * 8  # the others fill up to 8 bytes


def _matrix(body: memoryview, order: str) -> tuple[str, np.ndarray]:
    """(name, array) of a matrix: elements with its class, its shape, its name and its numbers, column by column."""
    (_, flags), (_, shape), (_, label), (kind, values), *_ = _elements(body, order)
    (word,) = struct.unpack_from(f"{order}I", flags)
    name = bytes(label).decode("ascii")
    if word & COMPLEX or word & 0xFF not in MEANT or not np.can_cast(STORED[kind], MEANT[word & 0xFF]):
        raise ValueError(f"its variable {name!r} is no array of real numbers")
    numbers = np.frombuffer(values, order + STORED[kind]).astype(MEANT[word & 0xFF], copy=False)
    return name, numbers.reshape(np.frombuffer(shape, f"{order}i4"), order="F")
