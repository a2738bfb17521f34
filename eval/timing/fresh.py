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
    """work(*args), module-level and picklable, in a fresh process. Raises UserError if the system ends that."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(work, *args).result()
        except BrokenProcessPool as error:
            raise UserError("a measurement was killed, most likely for want of memory: give smaller sizes") from error


def extra(make: Callable[..., tuple], way: Callable[..., Any], size: int, *more: Any) -> int:
    """Peak bytes of way(*make(size, *more)) beyond its inputs and the tensors it returns, in a fresh process."""
    return run(_extra, make, way, size, *more)


def _extra(make: Callable[..., tuple], way: Callable[..., Any], size: int, *more: Any) -> int:
    way(*make(SMALL, *more))
    inputs = make(size, *more)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak until now: it becomes what is resident
    result = way(*inputs)
    returned = result.values() if isinstance(result, dict) else ()
    return resident("VmHWM") - before - sum(x.nbytes for x in returned if isinstance(x, torch.Tensor))


def resident(field: str) -> int:
    """Bytes of this process now ("VmRSS") or at its peak ("VmHWM").

    Not `ru_maxrss`: a process that is started by another one begins with the other's peak.
    """
    for row in Path("/proc/self/status").read_text().splitlines():
        if row.startswith(field):
            return 1024 * int(row.split()[1])
    raise UserError(f"/proc/self/status has no {field}: memory is measured on Linux only")
