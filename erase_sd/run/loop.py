"""Running a method on a task: progress bar, checkpoints, stop on a signal, resume. Methods only yield."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from erase_sd.common.errors import LostModel
from erase_sd.common.signals import StopFlag
from erase_sd.core.task import Task, first_lost
from erase_sd.run.folder import Progress, RunFolder


def execute(
    method: Any,
    task: AbstractContextManager[tuple[Task, dict[str, Tensor]]],
    folder: RunFolder | None,
    finish: Callable[[Progress], dict],
    *,
    wait: Callable[[], None],
    every: int,
    description: str,
    images: int = 0,
    log: Callable[[dict, int], None] = lambda values, step: None,
    probe: Callable[[Task, int], object] | None = None,
    reuse: Callable[[RunFolder], None] = lambda folder: None,
) -> dict:
    """Carry out a run in its folder and return its record; a complete run is not carried out again.

    `task` is entered once the folder is this run's own: it yields the task and the tensors, by name, that make a
    checkpoint, and is left before `finish(progress)`, which writes the results and returns the record; the progress
    has no state then. `wait` is the barrier of all processes. `probe(task, step)` raises FloatingPointError, before
    they are saved, for weights that compute nothing finite. `reuse(folder)` is called instead of everything else where
    the run is complete. The other arguments are those of `run`. Raises what `RunFolder` and `run` do; SystemExit, with
    nothing lost, when a signal comes while results are written.
    """
    with StopFlag() as stop, folder or nullcontext():  # one flag, so that no signal is lost between two of them
        wait()  # all see the folder alike: before the run, or after
        if folder and (done := folder.complete()):
            reuse(folder)
            return done
        if folder:
            folder.status("running")
        with task as prepared:
            progress = _carried_out(
                method,
                *prepared,
                folder,
                probe,
                every=every,
                description=description,
                images=images,
                log=log,
            )
            del prepared  # and with it the device's memory, which the results need
        record = finish(progress)
        if folder:
            if folder.writes:
                stop.leave()
            folder.finish(record)
        wait()  # nobody goes on to use what is not written yet
        return record


def _carried_out(
    method: Any,
    task: Task,
    weights: dict[str, Tensor],
    folder: RunFolder | None,
    probe: Callable[[Task, int], object] | None,
    **how: Any,
) -> Progress:
    """Run the method to its end and return the progress, without the method's state: nobody goes on from there."""

    def check(step: int) -> None:
        check_finite(task, weights, step, probe)

    return run(method, task, weights, folder, check=check, **how)._replace(state=None)


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
    the global batch of a step, from which the images/s come that are shown and logged. Raises LostModel when the model
    is lost, SystemExit with 128 + signal when any rank is stopped.
    """
    progress = Progress(None, [], {})
    if folder:
        progress = folder.resume(weights, task.shards.local) or progress
    steps = method.steps
    try:
        with StopFlag() as stop, _bar(steps, len(progress.trace), description) as bar:
            since = time.monotonic()
            for record, state in method(task, progress.state):
                progress = progress.after(record, state)
                speed = {"images/s": images / (time.monotonic() - since)} if images else {}
                _tell(record | speed, bar, log)
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
        raise LostModel(f"{error}: the model is lost, nothing was saved; lower {_gentler(method)}") from error
    return progress


@torch.no_grad()
def check_finite(
    task: Task, weights: dict[str, Tensor], step: int, probe: Callable[[Task, int], object] | None = None
) -> None:
    """Raise FloatingPointError if the last step lost the model, which the loop itself would notice in the next one."""
    if name := first_lost(weights, task.shards):
        raise FloatingPointError(f"after {step} steps {name} holds NaN or infinity")
    if probe:  # finite weights can be too large to compute
        try:
            probe(task, step)
        except FloatingPointError as error:
            raise FloatingPointError(f"after {step} steps {error}") from error


def _bar(steps: int, done: int, description: str) -> tqdm:
    """Return the first process's progress bar over steps; the other processes have a hidden one."""
    hidden = {"disable": True} if os.environ.get("RANK", "0") != "0" else {}  # False would overrule TQDM_DISABLE
    return tqdm(total=steps, initial=done, desc=description, unit="step", **hidden)


def _tell(record: dict, bar: tqdm, log: Callable[[dict, int], None]) -> None:
    """Show what the method has just done and hand a step's numbers to the trackers, those that have a value."""
    show(bar, record)
    if "step" not in record:
        return
    numbers = {}
    for name, value in record.items():
        if not math.isnan(value):
            numbers[name] = value
    log(numbers, record["step"])


def _told(task: Task, stop: StopFlag, weights: dict[str, Tensor]) -> bool:
    """Return whether any rank was told to stop: all save and leave after the same step."""
    device = next(iter(weights.values())).device
    return float(task.mean(torch.tensor(float(stop.is_set()), device=device))) > 0


def _due(record: dict, state: dict, every: int, steps: int) -> bool:
    """Return whether a checkpoint is due: at its turn, after a phase that changed anything, after the last step."""
    if "measured" in state:
        return state["measured"] % every == 0
    if "phase" in record:
        return bool(record.get("changed", True)) or steps == 0
    return state["step"] % every == 0 or state["step"] == steps


def show(bar: tqdm, record: dict) -> None:
    """Show on the bar what the method has just done: part of a phase before the steps, the trim, or a step."""
    if "changed" in record:
        bar.set_postfix_str(f"{sum(record['changed'].values()):,} entries re-initialised")
        return
    if "phase" in record:
        bar.set_postfix_str(f"measuring {record['phase']}")
        return
    bar.update()
    shown = {}
    for key in ("loss", "loss_r", "loss_f", "cos", "c", "images/s"):
        value = record.get(key, math.nan)
        if not math.isnan(value):
            shown[key] = f"{value:,.0f}" if key == "images/s" and value >= 100 else f"{value:.3g}"
    bar.set_postfix(shown)


def _gentler(method: Any) -> str:
    """Name the options of a method that can be too strong."""
    return " or ".join(f"--{name}" for name in method.too_strong()) or "its weights"
