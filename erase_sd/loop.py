"""Running a method on a task: progress bar, checkpoints, stop on a signal, resume. Methods only yield."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm

from erase_sd.core.task import Task
from erase_sd.folder import Progress, RunFolder
from erase_sd.process import StopFlag, UserError


def run(
    method: Any,
    task: Task,
    weights: dict[str, Tensor],
    folder: RunFolder | None,
    *,
    every: int,
    check: Callable[[int], None],
    description: str,
) -> Progress:
    """Run the method from its last checkpoint in `folder` to its end, editing `weights` in place.

    A method without `steps` counts as one step. `every` is the number of steps between two checkpoints; `check(step)`
    raises FloatingPointError for weights that must not be saved. Raises UserError when the model is lost, SystemExit
    with 128 + signal when stopped.
    """
    progress = (folder and folder.resume(weights)) or Progress(None, [], {})
    steps = getattr(method, "steps", 1)
    try:
        hidden = {"disable": True} if os.environ.get("RANK", "0") != "0" else {}  # False would overrule TQDM_DISABLE
        with StopFlag() as stop, tqdm(total=steps, desc=description, unit="step", **hidden) as bar:
            bar.update(len(progress.trace))
            for record, state in method(task, progress.state):
                progress = progress.after(record, state)
                show(bar, record)
                step = state["step"] if state else None
                if state and (stop.is_set() or (step and step % every == 0) or step == steps):
                    check(step)
                    if folder:
                        folder.save(weights, progress)
                if stop.is_set():
                    raise SystemExit(128 + stop.signum)
    except FloatingPointError as error:
        raise UserError(f"{error}: the model is lost, nothing was saved; lower {_gentler(method)}") from error
    return progress


def show(bar: tqdm, record: dict) -> None:
    """What the method has just done: part of a phase before the steps, the trim, or a step."""
    if "changed" in record:
        return bar.set_postfix_str(f"{sum(record['changed'].values()):,} entries re-initialised")
    if "phase" in record:
        return bar.set_postfix_str(f"measuring {record['phase']}")
    bar.update()
    bar.set_postfix({key: f"{record[key]:.3g}" for key in ("loss", "loss_r", "cos", "c") if key in record})


def _gentler(method: Any) -> str:
    """The knobs of a method that can be too strong."""
    return " or ".join(f"--{name}" for name in ("lr", "lam", "fraction") if hasattr(method, name)) or "its weights"
