"""Steps along a gradient: optimiser, learning rate, a state that resumes bit for bit: what every loop shares."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from erase_sd.common.cli import knob
from erase_sd.core.optimizers import OptimizerSettings, apply, make_optimizer, put, slots
from erase_sd.core.projection import dot
from erase_sd.core.task import Params, Task, clear, taken


@dataclass(frozen=True, kw_only=True)
class Descent(OptimizerSettings):
    """Knobs of any method that takes steps along a gradient."""

    steps: int = knob(125, "steps")
    schedule: Literal["constant", "linear", "cosine", "multistep"] = knob(
        "constant", "decay of the learning rate to 0 over the steps, or to a tenth at each milestone"
    )
    milestones: tuple[float, ...] = knob((), "where multistep decays, as shares of the steps, in [0, 1]")
    warmup_steps: int = knob(0, "steps over which the learning rate first rises linearly")
    max_grad_norm: float | None = knob(None, "clip the gradient that is applied to this L2 norm")


DECAY = {"constant": lambda x: 1.0, "linear": lambda x: 1 - x, "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x))}


def descend(
    task: Task,
    knobs: Descent,
    objective: Callable[[Any, int], Tensor],
    state: dict | None = None,
    *,
    before: Callable[[Any, int], None] = lambda batch, step: None,
    edit: Callable[[Params], None] = lambda g: None,
    after: Callable[[], None] = lambda: None,
    besides: dict[str, nn.Parameter] | None = None,
) -> Iterator[tuple[dict, dict]]:
    """Minimise objective(part, step) over task.trainable(), in place; yields (record, state) after each step.

    `before` sees the whole batch, the objective a part of it; `edit` changes the gradient in place before it is
    applied, `after` the weights once it is; `besides` are trained as well without being the model's. Records hold
    step, loss and lr; states are those of `repair`. Raises FloatingPointError naming the step when a loss or gradient
    is not finite.
    """
    theta = task.trainable() | (besides or {})
    optimizer = make_optimizer(theta, knobs)
    start = 0 if state is None else restore(optimizer, theta, state)
    for step in range(start, knobs.steps):
        optimizer.param_groups[0]["lr"] = lr = learning_rate(knobs, step)
        try:
            batch = task.batch("repair", step)
            before(batch, step)
            losses = lambda part: {"objective": objective(part, step)}  # noqa: B023, E731
            values, g = differentiate(task, losses, batch, theta)
        except FloatingPointError as error:
            raise FloatingPointError(f"step {step}: {error}") from error
        edit(g)
        clip_(task, g, knobs.max_grad_norm)
        apply(optimizer, theta, g, knobs.rounding, task.seed, step)
        after()
        yield {"step": step, "loss": values["objective"], "lr": lr}, state_of(optimizer, theta, step)


def learning_rate(knobs: Descent, step: int) -> float:
    """Linear rise over warmup_steps, then the decay of the schedule; a function of the step alone."""
    if step < knobs.warmup_steps:
        return knobs.lr * (step + 1) / knobs.warmup_steps
    if knobs.schedule == "multistep":
        return knobs.lr * 0.1 ** sum(step >= share * knobs.steps for share in knobs.milestones)
    return knobs.lr * DECAY[knobs.schedule]((step - knobs.warmup_steps) / (knobs.steps - knobs.warmup_steps))


def differentiate(
    task: Task,
    losses: Callable[[Any], dict[str, Tensor]],
    batch: Any,
    params: dict[str, nn.Parameter],
    wanted: Callable[[dict[str, float]], bool] = lambda values: True,
) -> tuple[dict[str, float], Params | None]:
    """The values of all losses over the global batch, and the gradient of the last one; None unless wanted(values).

    What is wanted is known before the last part's backward pass, which is the only one of a batch in one part.
    Raises FloatingPointError for a loss or gradient that is not finite.
    """
    so_far: dict[str, Tensor] = {}
    try:
        for part in task.micro_batches(batch):
            L = {name: part.share * x for name, x in losses(part.batch).items()}
            so_far = {name: so_far.get(name, 0) + x.detach() for name, x in L.items()}
            if part.last and not wanted(values := _values(task, so_far)):
                return values, None
            task.backward(list(L.values())[-1])
        return values, taken(task, params)
    finally:
        clear(task)


@torch.no_grad()
def measure(task: Task, loss: Callable[[Any], Tensor], batch: Any, name: str) -> float:
    """One loss over the global batch. Raises FloatingPointError naming it when it is not finite."""
    return _values(task, {name: sum(part.share * loss(part.batch) for part in task.micro_batches(batch))})[name]


def _values(task: Task, losses: dict[str, Tensor]) -> dict[str, float]:
    """Means over the ranks, alike on every rank, so that all of them take the same decisions."""
    values = dict(zip(losses, task.mean(torch.stack(list(losses.values()))).tolist(), strict=True))
    for name, x in values.items():
        if not math.isfinite(x):
            raise FloatingPointError(f"the {name} loss is {x}")
    return values


def inner(task: Task, a: Params, b: Params) -> float:
    """<a, b> over all entries, wherever they are."""
    return float(task.total(dot(a, b)))


def clip_(task: Task, g: Params, max_norm: float | None) -> None:
    """Scale g down to max_norm, if there is one; the sign of <g, g_f> stays."""
    norm = 0.0 if max_norm is None else math.sqrt(inner(task, g, g))
    if max_norm is not None and norm > max_norm:
        for x in g.values():
            x.mul_(max_norm / norm)


def state_of(optimizer: torch.optim.Optimizer, theta: dict[str, nn.Parameter], step: int) -> dict:
    """{"step": next step, "optimizer": {"<parameter>/<slot>": tensor}}, the tensors being the optimiser's own."""
    return {"step": step + 1, "optimizer": slots(optimizer, theta)}


def restore(optimizer: torch.optim.Optimizer, theta: dict[str, nn.Parameter], state: dict) -> int:
    """Put a yielded state back; returns the step to go on with."""
    put(optimizer, theta, state["optimizer"])
    return state["step"]
