"""Work in a fresh Python process, and the peak of its resident memory as Linux counts it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from erase_sd.common.errors import UserError

SMALL = 4096  # entries with which the libraries load their code before anything is measured


def run(work: Callable[..., Any], *args: Any) -> Any:
    """Return work(*args), module-level and picklable, from a fresh process.

    Raises UserError if the system ends that process.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(work, *args).result()
        except BrokenProcessPool as error:
            raise UserError("a measurement was killed, most likely for want of memory: give smaller sizes") from error


def extra(make: Callable[..., tuple], way: Callable[..., Any], size: int, *more: Any) -> int:
    """Return the peak bytes of way(*make(size, *more)) in a fresh process, beyond its inputs and returned tensors."""
    return run(_extra, make, way, size, *more)


def _extra(make: Callable[..., tuple], way: Callable[..., Any], size: int, *more: Any) -> int:
    way(*make(SMALL, *more))
    inputs = make(size, *more)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak until now: it becomes what is resident
    result = way(*inputs)
    peak = resident("VmHWM")
    returned = 0
    if isinstance(result, dict):
        for x in result.values():
            if isinstance(x, torch.Tensor):
                returned += x.nbytes
    return peak - before - returned


def resident(field: str) -> int:
    """Return the bytes of this process now ("VmRSS") or at its peak ("VmHWM").

    Not `ru_maxrss`: a process that is started by another one begins with the other's peak.
    """
    for row in Path("/proc/self/status").read_text().splitlines():
        if row.startswith(field):
            return 1024 * int(row.split()[1])
    raise UserError(f"/proc/self/status has no {field}: memory is measured on Linux only")
