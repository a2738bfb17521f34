"""Trims of the pocket model that are measured and taken back; see `eval.selectivity` for what the numbers mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from itertools import product
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from erase_sd.core.descent import measure
from erase_sd.core.projection import products
from erase_sd.core.sensitivity import averages, connection_sensitivity, entries, top_k
from erase_sd.core.task import gradient
from erase_sd.core.trim import reinitialise_
from erase_sd.denoising import DenoisingTask
from erase_sd.devices import accelerator
from erase_sd.latents import Samples, collect
from erase_sd.pipeline import load
from erase_sd.plan import Plan, make
from erase_sd.pocket import FOLDER
from erase_sd.process import UserError
from erase_sd.subject import resolve
from eval.models import weights_digest

Masks = dict[str, Tensor]


class Cut(NamedTuple):
    """One saliency's selection for one concept; losses in units of those before the trim."""

    scope: str
    saliency: str
    concept: str
    seed: int
    k: int
    others: float
    retained: float
    forget: float
    retain: float
    gap: float
    cos_forget: float
    cos_contrast: float


def cuts(
    concepts: tuple[str, ...],
    saliencies: tuple[str, ...],
    scopes: tuple[str, ...],
    seeds: tuple[int, ...],
    batches: int,
    folder: str,
) -> list[Cut]:
    """Every combination, scope by scope. Raises UserError for an unknown concept, saliency or scope."""
    plans = {key: _plan(*key, saliencies) for key in product(scopes, seeds, concepts)}
    found: list[Cut] = []
    bar = tqdm(total=len(plans) * len(saliencies), desc="selectivity", unit="trim")
    for scope, seed in product(scopes, seeds):
        selected: dict[tuple[str, str], Masks] = {}
        measured: dict[tuple[str, str], dict[str, Any]] = {}
        for concept in concepts:
            plan = plans[scope, seed, concept]
            task = DenoisingTask(*_taught(plan, Path(folder)), plan.used_losses(), seed, accelerator("no"))
            for saliency, masks, values in trims(task, plan, saliencies, batches):
                selected[saliency, concept], measured[saliency, concept] = masks, values
                bar.update()
        found += [
            Cut(scope, saliency, concept, seed, others=_others(selected, saliency, concept), **values)
            for (saliency, concept), values in measured.items()
        ]
    return sorted(found, key=lambda cut: (scopes.index(cut.scope), saliencies.index(cut.saliency)))


def _plan(scope: str, seed: int, concept: str, saliencies: tuple[str, ...]) -> Plan:
    """The default's plan in another scope; refuses now what it would refuse after an hour."""
    given = {"model": "pocket", "concept": concept, "seed": seed, "trim_scope": scope, "anchor_pictures": False}
    for saliency in saliencies:
        make(**given, saliency=saliency)
    plan = make(**given)
    resolve(plan.job)
    return plan


def _taught(plan: Plan, folder: Path) -> tuple[Any, Samples]:
    """The pocket model and what it is taught from."""
    pipe, asked = load(str(FOLDER)), resolve(plan.job)
    return pipe, collect(
        pipe, asked.sources, plan.sampling, plan.job.seed, weights_digest("pocket"), folder / ".cache"
    )


def trims(task: DenoisingTask, plan: Plan, saliencies: tuple[str, ...], batches: int) -> Generator[Any]:
    """(saliency, what it selects, the numbers of its trim); the task's weights are as before after each."""
    theta, knobs = task.ranked(), plan.method
    whole = {name: p.detach().clone() for name, p in theta.items()}
    before = _losses(task, batches)
    passes = {"g_r": (task.retain, lambda g: g)}
    g_r = _last(averages(task, passes, theta, knobs.sensitivity_batches))["g_r"]
    k = round(knobs.fraction * entries(g_r, task))
    common = top_k(connection_sensitivity(theta, g_r), k, shards=task)
    for saliency in saliencies:
        scores = _last(dataclasses.replace(knobs, saliency=saliency).sensitivity(task))
        masks = top_k(scores, k, shards=task)
        reinitialise_(task.trimmable(), masks, knobs.init, task.seed, task)
        after = _losses(task, batches)
        values = {name: after[name] / before[name] for name in ("forget", "retain")}
        values |= {"gap": -after["contrast"] / after["forget"]} | _cosines(task, batches)
        with torch.no_grad():
            for name, p in theta.items():
                p.copy_(whole[name])
        yield saliency, masks, {"k": k, "retained": overlap(masks, common)} | values


def _last(steps: Generator[Any, None, Any]) -> Any:
    """What a generator returns at its end."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def _losses(task: DenoisingTask, batches: int) -> dict[str, float]:
    """Means over the first `batches` batches that no saliency has seen."""
    losses = {"forget": task.forget, "retain": task.retain, "contrast": task.contrast}
    drawn = [task.batch("selectivity", b) for b in range(batches)]
    return {name: sum(measure(task, L, batch, name) for batch in drawn) / batches for name, L in losses.items()}


def _cosines(task: DenoisingTask, batches: int) -> dict[str, float]:
    """Of the retain gradient to the two constraints' on the same batch, as a step of the repair has them; means."""
    totals = {"cos_forget": 0.0, "cos_contrast": 0.0}
    for b in range(batches):
        batch, theta = task.batch("selectivity", b), task.trainable()
        g_r = gradient(task, task.retain, batch, theta)
        for name, loss in (("cos_forget", task.forget), ("cos_contrast", task.contrast)):
            along, norm2, norm2_f = products(g_r, gradient(task, loss, batch, theta)).tolist()
            totals[name] += along / sqrt(norm2 * norm2_f) / batches
    return totals


def overlap(masks: Masks, others: Masks) -> float:
    """The share of the selected entries that the others select too."""
    chosen = sum(int(mask.sum()) for mask in masks.values())
    if not chosen:
        raise UserError("nothing is selected: the scope has too few entries for the default's --fraction")
    return sum(int((mask & others[name]).sum()) for name, mask in masks.items()) / chosen


def _others(selected: dict[tuple[str, str], Masks], saliency: str, concept: str) -> float:
    """Mean overlap with what the same saliency selects for the other concepts."""
    rest = [masks for (one, other), masks in selected.items() if one == saliency and other != concept]
    return sum(overlap(selected[saliency, concept], masks) for masks in rest) / len(rest)
