"""Can this job be carried out on this model? Asked before anything is drawn, by the run and by --dry_run alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from erase_sd.common.errors import UserError
from erase_sd.denoising.samples import check_captions
from erase_sd.denoising.task import trimmed
from erase_sd.models.checks import check_network
from erase_sd.models.families import Family
from erase_sd.models.noise import check_scheduler
from erase_sd.models.parameters import select, without_norms
from erase_sd.plan import Plan
from prompts import Example


def check_job(plan: Plan, examples: Iterable[Example], kind: Family, parts: Mapping[str, Any], processes: int) -> None:
    """Raise UserError for a job that would fail on the way.

    `examples` are what the job learns to forget; `parts` are the pipeline's components by name, of which no weight is
    read: those of the meta device will do.
    """
    model: nn.Module = parts[kind.part]
    check_network(kind, parts, plan.job.model)
    check_scheduler(parts["scheduler"])
    losses = plan.losses
    for scope in (losses.trim_scope, losses.rank_scope or "full", losses.train_scope):
        select(model, scope)
    if plan.method.trims():
        _check_trim(model, plan)
    plan.method.check_network(model, select(model, losses.train_scope))
    if plan.method.reads_words:
        check_captions(parts["tokenizer"], examples)
    least = processes * losses.gradient_accumulation_steps
    if losses.batch_size < least:
        raise UserError(f"--batch_size {losses.batch_size} leaves micro-batches empty: give {least} or more")


def _check_trim(model: nn.Module, plan: Plan) -> None:
    """Refuse a trim of nothing, of what was not ranked, and one that was asked for where nothing is trained."""
    scope, training_scope, rank_scope = plan.losses.trim_scope, plan.losses.train_scope, plan.losses.rank_scope
    asked = without_norms(model, select(model, scope))
    if not asked:
        raise UserError(f"--trim_scope {scope} holds norms only, which are never re-initialised: widen it")
    repaired = trimmed(model, scope, select(model, training_scope))
    outside = sorted(asked.keys() - repaired.keys())
    if outside and (plan.chose_trim_scope() or not repaired):
        raise UserError(
            f"--trim_scope {scope} re-initialises {outside[0]}, which --train_scope {training_scope} never repairs: "
            "narrow the first or widen the second"
        )
    if not rank_scope:
        return
    unranked = sorted(repaired.keys() - select(model, rank_scope).keys())
    if unranked:
        raise UserError(
            f"--trim_scope {scope} re-initialises {unranked[0]}, which --rank_scope {rank_scope} never ranks: "
            "narrow the first, widen the second, or give --rank_scope none"
        )
