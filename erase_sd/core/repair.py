"""Repair: retrain what is left without a step that brings the concept back (Wu & Harandi 2024, Algorithm 1).

    g_f = grad L_f,   g_r = grad L_r,   c = max(lam, <g_r, g_f> / |g_f|^2),   theta <- theta - lr (g_r - c g_f)

is the paper's loop: ascent and constraint share g_f, so g_o = grad(L_r - lam L_f) and the projection of Eq. 5 collapse
to one coefficient. Other settings replace the objective, the constraint, the optimizer or the place of the projection.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import nn

from erase_sd.common.cli import knob
from erase_sd.common.errors import UserError
from erase_sd.core.descent import Descent, Term, clip_, differentiate, inner, learning_rate, measure, restore, state_of
from erase_sd.core.optimizers import apply, make_optimizer
from erase_sd.core.projection import coefficient, collapsed, products, subtract_
from erase_sd.core.task import Loss, Params, Task, kept


@dataclass(frozen=True, kw_only=True)
class Repair(Descent):
    """Options of the repair loop; the defaults are Algorithm 1 to the letter, with the paper's CIFAR-10 lambda."""

    lam: float = knob(0.05, "weight of the forget term beside the retain loss, >= 0")
    retain_loss: Literal["data", "original"] = knob(
        "data", "what the repair keeps: L_r on the retain data, or the original model's own predictions on them"
    )
    objective: Literal["ascent", "redirect"] = knob("ascent", "forget term: raise L_f, or fit the replacement instead")
    constraint: Literal["forget", "contrast"] = knob(
        "forget", "loss that no step may lower: L_f, or L_f - replacement's"
    )
    projection: Literal["on", "off", "after-preconditioning"] = knob(
        "on", "project the gradient, nothing, or the update the optimizer makes of it"
    )
    margin: float = knob(0.0, "least multiplier v of a projection that bites, in units of g_f (released code: 0.5)")
    ridge: float = knob(0.0, "added to |g_f|^2 in the projection, squared gradient units (released code: 1e-3)")
    forget_ceiling: float | None = knob(
        None, "under ascent: forget loss above which lam is 0 for the step, in units of L_f"
    )
    release_at: float | None = knob(
        None, "constraint loss from which on the projection, and ascent on that loss, rest; in units of that loss"
    )
    project_from: int = knob(0, "first step at which the projection is on")

    SIGNED: ClassVar[frozenset[str]] = frozenset({"release_at"})

    def __post_init__(self) -> None:
        """Raise UserError as Descent does, and for a projection that the rounding of bf16 weights would undo."""
        super().__post_init__()
        if self.projection == "after-preconditioning" and self.rounding != "nearest":
            raise UserError(
                f"--rounding {self.rounding} is for gradients that are projected before the optimizer: "
                "give --projection on"
            )

    @property
    def needs_original(self) -> bool:
        """Return whether a copy of the original model has to be kept."""
        return self.retain_loss == "original"

    @property
    def asks_original(self) -> bool:
        """Return whether a loss uses the original model where it is kept."""
        return self.needs_original or self.objective == "redirect"


class Gradients(NamedTuple):
    """What one step knows: the step subtracts c g_f from g, and c >= own."""

    g: Params
    g_f: Params | None  # None where nothing is constrained
    own: float  # the part of c that belongs to the objective: lam where ascent and constraint share g_f, else 0
    record: dict[str, float]


def repair(task: Task, settings: Repair, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
    """Move task.trainable() in place for settings.steps steps; yield (record, state) after each.

    record: step, loss_r, loss_f (forget loss under ascent, else the constraint's; NaN when not computed), loss_o (the
    objective), cos (of g_f to g_r, to g_o where they share nothing), c (multiple of g_f subtracted from the gradient;
    from the update after preconditioning), bit (the projection acted), ceiling (it was exceeded), lr.
    state: {"step": next step, "optimizer": {"<parameter>/<slot>": tensor}}. Its tensors are the optimizer's own: store
    or clone them before the next step. With the weights it continues bit for bit like an uninterrupted run.
    Raises FloatingPointError naming the step when a loss or gradient is not finite; the weights are those before it.
    """
    theta = task.trainable()
    optimizer = make_optimizer(theta, settings)
    start = 0 if state is None else restore(optimizer, theta, state)
    for step in range(start, settings.steps):
        lr = learning_rate(settings, step)
        optimizer.param_groups[0]["lr"] = lr
        try:
            record = _step(task, settings, theta, optimizer, step)
        except FloatingPointError as error:
            raise FloatingPointError(f"repair step {step}: {error}") from error
        yield {"step": step, **record, "lr": lr}, state_of(optimizer, theta, step)


def _step(
    task: Task, settings: Repair, theta: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, step: int
) -> dict:
    """Compute gradients, project, update; return the record."""
    projection = settings.projection if step >= settings.project_from else "off"
    batch = task.batch("repair", step)
    if settings.objective == "ascent" and settings.constraint == "forget":
        g, g_f, own, record = _shared(task, settings, theta, batch)
    else:
        g, g_f, own, record = _separate(task, settings, theta, batch, projecting=projection != "off")
    c, cos, bit, norm2_f = own, math.nan, False, 0.0
    if g_f is not None:
        dot_of, norm2, norm2_f = task.shards.all_reduce(products(g, g_f)).tolist()
        cos = dot_of / (math.sqrt(norm2_f * norm2) or math.nan)
        if projection == "on":
            c = collapsed(dot_of, norm2_f, own, settings.margin, settings.ridge)
            bit = c > own
        subtract_(g, g_f, c)
    clip_(task, g, settings.max_grad_norm)
    if projection == "after-preconditioning" and g_f is not None:
        before = _copies(theta)
        apply(optimizer, theta, g, settings.rounding, task.seed, step)
        c = _project_update_(task, theta, before, g_f, norm2_f)
        bit = c > 0
    else:
        apply(optimizer, theta, g, settings.rounding, task.seed, step)
    return record | {"cos": cos, "c": c, "bit": bit}


def _copies(theta: dict[str, nn.Parameter]) -> Params:
    """Return the weights as they are now."""
    copies: Params = {}
    for name, p in theta.items():
        copies[name] = p.detach().clone()
    return copies


def _project_update_(task: Task, theta: dict[str, nn.Parameter], before: Params, g_f: Params, norm2_f: float) -> float:
    """Project the update that the optimizer made, so that it does not lower the constrained loss; return c.

    `before` are the weights before the update; they are overwritten.
    """
    u = before
    subtract_(u, theta, 1.0)  # the update as a descent direction
    c = coefficient(inner(task, u, g_f), norm2_f)
    subtract_(theta, g_f, -c)  # theta - (u - c g_f), without another copy of either
    return c


def _shared(task: Task, settings: Repair, theta: dict[str, nn.Parameter], batch: Any) -> Gradients:
    """Compute what Algorithm 1 needs: two backward passes, one stored gradient; lam enters through c."""
    loss_f, g_f = _constraint(task, settings, theta, batch)
    lam, ceiling = _below_ceiling(settings, loss_f)
    if g_f is None:
        lam = 0.0  # forgotten: nothing but repair
    values, g_r = differentiate(task, {"retain": Term(_retained(task, settings))}, batch, theta)
    loss_r = values["retain"]
    record = {"loss_r": loss_r, "loss_f": loss_f, "loss_o": loss_r - lam * loss_f, "ceiling": ceiling}
    return Gradients(g_r, g_f, lam, record)


def _separate(task: Task, settings: Repair, theta: dict[str, nn.Parameter], batch: Any, projecting: bool) -> Gradients:
    """Compute objective and constraint apart."""
    g_f, loss_f, lam, ceiling = None, math.nan, settings.lam, False
    if projecting:
        loss_f, g_f = _constraint(task, settings, theta, batch)
    if settings.objective == "ascent" and settings.forget_ceiling is not None:  # lam is the whole batch's
        lam, ceiling = _below_ceiling(settings, measure(task, task.forget, batch, "forget"))
    objective = {"retain": Term(_retained(task, settings))}
    if settings.objective == "ascent":
        objective["forget"] = Term(task.forget, -lam)
    else:
        objective["redirect"] = Term(task.redirect, lam)
    values, g = differentiate(task, objective, batch, theta)
    loss_r, loss_f = values["retain"], values.get("forget", loss_f)
    record = {"loss_r": loss_r, "loss_f": loss_f, "loss_o": values["objective"], "ceiling": ceiling}
    return Gradients(g, g_f, 0.0, record)


def _constraint(
    task: Task, settings: Repair, theta: dict[str, nn.Parameter], batch: Any
) -> tuple[float, Params | None]:
    """Return the constrained loss and its gradient, None where it rests: a loss that may rest is measured first.

    From `release_at` on the concept is gone, and the constraint would only forbid directions that repair.
    """
    name = settings.constraint
    loss = task.forget if name == "forget" else task.contrast
    if settings.release_at is not None:
        loss_f = measure(task, loss, batch, name)
        if loss_f >= settings.release_at:
            return loss_f, None
    values, g_f = differentiate(task, {name: Term(loss)}, batch, theta)
    return values[name], kept(g_f, theta)


def _retained(task: Task, settings: Repair) -> Loss:
    """Return the loss of what the repair keeps."""
    return task.retain if settings.retain_loss == "data" else task.preserve


def _below_ceiling(settings: Repair, loss_f: float) -> tuple[float, bool]:
    """Return (lam, False), or (0, True) above the ceiling: ascent is unbounded, while the projection may stay on."""
    over = settings.forget_ceiling is not None and loss_f > settings.forget_ceiling
    return (0.0 if over else settings.lam), over
