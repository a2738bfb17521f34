"""Running a method on a task: progress bar, checkpoints, stop on a signal, resume. Methods only yield."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from erase_sd.common.errors import UserError
from erase_sd.common.signals import StopFlag
from erase_sd.core.task import Task
from erase_sd.run.folder import Progress, RunFolder


def run(
    method: Any,
    task: Task,
    weights: dict[str, Tensor],
    folder: RunFolder | None,
    *,
    every: int,
    check: Callable[[int], None],
    description: str,
    images: int = 0,
    log: Callable[[dict, int], None] = lambda values, step: None,
) -> Progress:
    """Run the method from its last checkpoint in `folder` to its end, editing `weights` in place.

    A method without `steps` counts as one step. `every` is the number of steps, or of sensitivity batches, between two
    checkpoints; `check(step)` raises FloatingPointError for weights that must not be saved. `images` is the size of
    the global batch of a step, from which the images/s come that are shown and logged. Raises UserError when the model
    is lost, SystemExit with 128 + signal when any rank is stopped.
    """
    progress = (folder and folder.resume(weights, task.shards.local)) or Progress(None, [], {})
    steps = method.steps
    try:
        with StopFlag() as stop, _bar(steps, len(progress.trace), description) as bar:
            since = time.monotonic()
            for record, state in method(task, progress.state):
                progress = progress.after(record, state)
                _tell(record | ({"images/s": images / (time.monotonic() - since)} if images else {}), bar, log)
                stopping = _told(task, stop, weights)
                if state and (stopping or _due(record, state, every, steps)):
                    if "measured" not in state:
                        check(state["step"])
                    if folder:
                        folder.save(task.shards.gather(weights), progress.mapped(task.shards.gather))
                if stopping:
                    raise SystemExit(128 + stop.signum)  # also where another rank was told to
                since = time.monotonic()
    except FloatingPointError as error:
        raise UserError(f"{error}: the model is lost, nothing was saved; lower {_gentler(method)}") from error
    return progress


def _bar(steps: int, done: int, description: str) -> tqdm:
    """The first process's progress bar over steps."""
    hidden = {"disable": True} if os.environ.get("RANK", "0") != "0" else {}  # False would overrule TQDM_DISABLE
    return tqdm(total=steps, initial=done, desc=description, unit="step", **hidden)


def _tell(record: dict, bar: tqdm, log: Callable[[dict, int], None]) -> None:
    """Show what the method has just done and hand a step's numbers to the trackers, those that have a value."""
    show(bar, record)
    if "step" in record:
        log({k: v for k, v in record.items() if not math.isnan(v)}, record["step"])


def _told(task: Task, stop: StopFlag, weights: dict[str, Tensor]) -> bool:
    """Whether any rank was told to stop: all save and leave after the same step."""
    device = next(iter(weights.values())).device
    return float(task.mean(torch.tensor(float(stop.is_set()), device=device))) > 0


def _due(record: dict, state: dict, every: int, steps: int) -> bool:
    """Whether a checkpoint is written: at its turn, after a phase that changed anything, after the last step."""
    if "measured" in state:
        return state["measured"] % every == 0
    if "phase" in record:
        return bool(record.get("changed", True)) or steps == 0
    return state["step"] % every == 0 or state["step"] == steps


def show(bar: tqdm, record: dict) -> None:
    """What the method has just done: part of a phase before the steps, the trim, or a step."""
    if "changed" in record:
        return bar.set_postfix_str(f"{sum(record['changed'].values()):,} entries re-initialised")
    if "phase" in record:
        return bar.set_postfix_str(f"measuring {record['phase']}")
    bar.update()
    shown = ("loss", "loss_r", "loss_f", "cos", "c", "images/s")
    bar.set_postfix({key: f"{record[key]:.3g}" for key in shown if key in record})


def _gentler(method: Any) -> str:
    """Name the options of a method that can be too strong."""
    return " or ".join(f"--{name}" for name in method.too_strong()) or "its weights"
