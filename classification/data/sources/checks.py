"""What every source checks in its files before it uses them."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from erase_sd.common.errors import UserError


def library(name: str) -> Any:
    """Import a module that only some data sets need; UserError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install erase-sd[classification]") from error


def root(folder: str, inner: str, files: Iterable[str]) -> Path:
    """Return the folder of these files: `folder` itself or `inner` in it. UserError names the first missing one."""
    path = Path(folder, inner)
    if not path.is_dir():
        path = Path(folder)
    for file in files:
        if not (path / file).is_file():
            raise UserError(f"{path} has no {file}: unpack the original archive there, all of it")
    return path


def labels(values: Any, classes: int, rows: int, place: object) -> Tensor:
    """Return `values` as (rows,) int64 in 0..classes-1.

    Raises UserError that names `place` and the first image labelled otherwise.
    """
    try:
        array = np.asarray(values)
    except ValueError:  # lists of unequal length
        array = np.empty(0, object)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UserError(f"the labels in {place} are not a list of whole numbers: get the original file again")
    if len(array) != rows:
        raise UserError(f"{place} has {rows} images but {len(array)} labels: get the original file again")
    wrong = np.flatnonzero((array < 0) | (array >= classes))
    if len(wrong):
        row = wrong[0]
        raise UserError(f"{place}: image {row} is labelled {array[row]}, outside 0..{classes - 1}: correct the file")
    return torch.from_numpy(array.astype(np.int64))
