"""Rounds that alternate between the ways compared, the median of their ratios, and exact operation counts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from statistics import median

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Ways = dict[str, Callable[[], object]]
Seconds = dict[str, list[float]]


def interleaved(ways: Ways, rounds: int, prepare: Callable[[], object] = lambda: None) -> Seconds:
    """Seconds of every way in every round; `prepare` runs before each measurement and is not counted."""
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
    """Median over the rounds of ours / theirs, each pair measured one after the other."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))


def line(name: str, what: str, value: float, target: str, detail: str) -> str:
    """One result; `target` is what the ratio should be, or empty."""
    goal = f"target {target}; " if target else ""
    return f"{name}: {what} = {value:.3g} ({goal}{detail})"


def operations(work: Callable[[], object]) -> int:
    """Floating-point operations of matrix products, convolutions and attention, a multiply-add being two.

    Attention is computed unfused meanwhile: the counter does not know every fused kernel.
    """
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        work()
    return counter.get_total_flops()


def machine() -> str:
    """Where it runs, with how many threads, and how busy the machine is with other work."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    load = os.getloadavg()[0]
    return f"{device}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, load average {load:.2f}"
