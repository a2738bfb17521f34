"""Rounds that alternate between the ways compared, the median of their ratios, and exact operation counts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

Ways = dict[str, Callable[[], object]]
Seconds = dict[str, list[float]]
Shape = tuple[int, ...]


def nothing() -> None:
    """Prepare nothing."""


def interleaved(ways: Ways, rounds: int, prepare: Callable[[], object] = nothing) -> Seconds:
    """Return the seconds of every way in every round; `prepare` runs before each measurement and is not counted."""
    seconds: Seconds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            prepare()
            start = _now()
            way()
            seconds[name].append(_now() - start)
    return seconds


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Return the median over the rounds of ours / theirs, each pair measured one after the other."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def line(name: str, what: str, value: float, target: str, detail: str) -> str:
    """Return one result; `target` is what the ratio should be, or empty."""
    goal = f"target {target}; " if target else ""
    return f"{name}: {what} = {value:.3g} ({goal}{detail})"


def operations(work: Callable[[], object]) -> int:
    """Return the floating-point operations of matrix products, convolutions and attention; a multiply-add is two."""
    counter = FlopCounterMode(display=False, custom_mapping=ATTENTION)
    with counter:
        work()
    return counter.get_total_flops()


def _attention(query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(_grad: Shape, query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
    """Twice the forward pass, as for any product: what a fused kernel computes once more is not useful work."""
    return 2 * sdpa_flop_count(query, key, value)


ATTENTION = {}  # torch counts the kernels of GPUs, not that of CPUs
for _kernel in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu"):
    ATTENTION[getattr(torch.ops.aten, f"_scaled_dot_product_{_kernel}")] = _attention
    ATTENTION[getattr(torch.ops.aten, f"_scaled_dot_product_{_kernel}_backward")] = _attention_backward


def machine() -> str:
    """Return where it runs, with how many threads, and how busy the machine is with other work."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    load = os.getloadavg()[0]
    return f"{device}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, load average {load:.2f}"
