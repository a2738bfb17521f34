"""Steps along a gradient: optimizer, learning rate, a state that resumes bit for bit: what every loop shares."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from erase_sd.common.cli import knob
from erase_sd.common.errors import UserError
from erase_sd.core.optimizers import OptimizerSettings, apply, make_optimizer, put, slots
from erase_sd.core.projection import dot
from erase_sd.core.task import Loss, Params, Task, clear, fitted, taken, terms


@dataclass(frozen=True, kw_only=True)
class Descent(OptimizerSettings):
    """Options of any method that takes steps along a gradient."""

    steps: int = knob(125, "steps", ("max_train_steps",))
    schedule: Literal["constant", "linear", "cosine", "multistep"] = knob(
        "constant",
        "decay of the learning rate to 0 over the steps, or to a tenth at each milestone",
        ("lr_scheduler",),
    )
    milestones: tuple[float, ...] = knob((), "where multistep decays, as shares of the steps, in [0, 1]")
    warmup_steps: int = knob(0, "steps over which the learning rate first rises linearly", ("lr_warmup_steps",))
    max_grad_norm: float | None = knob(None, "clip the gradient that is applied to this L2 norm")

    def __post_init__(self) -> None:
        """Raise UserError as OptimizerSettings does, and for a norm that leaves no steps."""
        super().__post_init__()
        if self.max_grad_norm == 0:
            raise UserError("--max_grad_norm 0 would clip every step away: give more, or none not to clip")


def do_nothing(*_: Any) -> None:
    """Do nothing: the hook of a loop that needs none."""


class Term(NamedTuple):
    """A loss, and its weight in an objective."""

    loss: Loss
    weight: float = 1.0


def descend(
    task: Task,
    settings: Descent,
    objective: Callable[[Any, int], Tensor | Iterable[Tensor]],
    state: dict | None = None,
    *,
    before: Callable[[Any, int], None] = do_nothing,
    edit: Callable[[Params], None] = do_nothing,
    after: Callable[[], None] = do_nothing,
    besides: dict[str, nn.Parameter] | None = None,
) -> Iterator[tuple[dict, dict]]:
    """Minimise objective(micro-batch, step) over task.trainable(), in place; yield (record, state) after each step.

    `before` sees the whole batch, the objective a micro-batch of it; `edit` changes the gradient in place before it is
    applied, `after` the weights once it is; `besides` are trained as well without being the model's. Records hold
    step, loss and lr; states are those of `repair`. Raises FloatingPointError naming the step when a loss or gradient
    is not finite.
    """
    theta = task.trainable() | (besides or {})
    optimizer = make_optimizer(theta, settings)
    start = 0 if state is None else restore(optimizer, theta, state)
    for step in range(start, settings.steps):
        lr = learning_rate(settings, step)
        optimizer.param_groups[0]["lr"] = lr

        def loss(part: Any, step: int = step) -> Tensor | Iterable[Tensor]:
            return objective(part, step)

        try:
            batch = task.batch("repair", step)
            before(batch, step)
            values, g = differentiate(task, {"loss": Term(loss)}, batch, theta)
        except FloatingPointError as error:
            raise FloatingPointError(f"step {step}: {error}") from error
        edit(g)
        clip_(task, g, settings.max_grad_norm)
        apply(optimizer, theta, g, settings.rounding, task.seed, step)
        after()
        yield {"step": step, "loss": values["loss"], "lr": lr}, state_of(optimizer, theta, step)


def learning_rate(settings: Descent, step: int) -> float:
    """Return the rate of a step: a linear rise over warmup_steps, then the schedule; a function of the step alone."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "multistep":
        passed = sum(step >= share * settings.steps for share in settings.milestones)
        return settings.lr * 0.1**passed
    return settings.lr * decay(
        settings.schedule, (step - settings.warmup_steps) / (settings.steps - settings.warmup_steps)
    )


def decay(schedule: str, x: float) -> float:
    """Return the share of the peak rate that is left after a share x of the steps, in [0, 1]."""
    if schedule == "linear":
        return 1 - x
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * x))
    return 1.0


def differentiate(
    task: Task, objective: dict[str, Term], batch: Any, params: dict[str, nn.Parameter]
) -> tuple[dict[str, float], Params]:
    """Return the values of the named losses and of their weighted sum, "objective", and the gradient of that.

    All are over the global batch; one graph is alive at a time. Raises FloatingPointError for a loss or gradient that
    is not finite.
    """

    def work() -> tuple[dict[str, float], Params]:
        totals: dict[str, Tensor] = {}
        for part in task.micro_batches(batch):
            whole = 0.0
            for name, (loss, weight) in objective.items():
                value = 0.0
                for term in terms(loss(part.batch)):
                    task.backward(part.share * (weight * term))
                    value = value + term.detach()
                totals[name] = totals.get(name, 0.0) + part.share * value
                whole = whole + weight * value
            totals["objective"] = totals.get("objective", 0.0) + part.share * whole
        return _values(task, totals), taken(task, params)

    try:
        return fitted(task, work)
    finally:
        clear(task)


@torch.no_grad()
def measure(task: Task, loss: Loss, batch: Any, name: str) -> float:
    """Return one loss over the global batch. Raises FloatingPointError naming it when it is not finite."""

    def work() -> float:
        total = 0.0
        for part in task.micro_batches(batch):
            total = total + part.share * sum(terms(loss(part.batch)))
        return _values(task, {name: total})[name]

    return fitted(task, work)


def _values(task: Task, losses: dict[str, Tensor]) -> dict[str, float]:
    """Return means over the ranks, alike on every rank, so that all of them take the same decisions."""
    values = dict(zip(losses, task.mean(torch.stack(list(losses.values()))).tolist(), strict=True))
    for name, x in values.items():
        if not math.isfinite(x):
            raise FloatingPointError(f"the {name} loss is {x}")
    return values


def inner(task: Task, a: Params, b: Params) -> float:
    """Return <a, b> over all entries, whichever rank holds them."""
    return float(task.shards.all_reduce(dot(a, b)))


def clip_(task: Task, g: Params, max_norm: float | None) -> None:
    """Scale g down to max_norm, if there is one; the sign of <g, g_f> stays."""
    if max_norm is None:
        return
    norm = math.sqrt(inner(task, g, g))
    if norm > max_norm:
        for x in g.values():
            x.mul_(max_norm / norm)


def state_of(optimizer: torch.optim.Optimizer, theta: dict[str, nn.Parameter], step: int) -> dict:
    """Return {"step": next step, "optimizer": {"<parameter>/<slot>": tensor}} with the optimizer's own tensors."""
    return {"step": step + 1, "optimizer": slots(optimizer, theta)}


def restore(optimizer: torch.optim.Optimizer, theta: dict[str, nn.Parameter], state: dict) -> int:
    """Put a yielded state back; return the step to go on with."""
    put(optimizer, theta, state["optimizer"])
    return state["step"]
