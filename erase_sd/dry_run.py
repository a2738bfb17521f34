"""--dry_run: what a job does and needs, from the model's configuration files alone; nothing is sampled or written."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from erase_sd.denoising.concept import PocketTarget, Target, resolve
from erase_sd.denoising.feasible import check_job
from erase_sd.denoising.task import trimmed
from erase_sd.methods.base import Sizes
from erase_sd.models.checks import check_index, check_place, check_single_file, explained
from erase_sd.models.families import family
from erase_sd.models.parameters import select
from erase_sd.plan import Plan

GIB = 2**30


def describe(plan: Plan, model: str) -> str:
    """Return the lines that --dry_run prints. Raises UserError for a model or a job that cannot be carried out."""
    target = resolve(plan.job)
    skeleton = outline(model, plan.job.model_config)
    _check(plan, target, model, skeleton)
    network = skeleton.pop("network")
    n = sizes(network, skeleton, plan)
    phases = memory(n, plan, torch.accelerator.is_available())
    totals: dict[str, int] = {}
    for name, parts in phases.items():
        totals[name] = sum(parts.values())
    peak = max(totals, key=totals.__getitem__)
    rows = [
        ("network", f"{type(network).__name__}, {n.network:,} parameters; the other parts have {n.others:,}"),
        ("trained", f"{n.trained:,} ({100 * n.trained / n.network:.1f} %), --train_scope {plan.losses.train_scope}"),
    ]
    if plan.method.trims():
        rows.append(("trimmed", _trim(n, plan)))
    rows += [("pictures", _images(plan, target)), ("steps", _steps(plan)), ("checkpoints", _checkpoints(n, plan))]
    for name, parts in phases.items():
        rows.append((f"memory, {name}", _sum(parts) + (" <- peak" if name == peak else "")))
    rows += [
        ("", f"The peak is {totals[peak] / (4 * n.network):.2f} times the network's fp32 weights;"),
        ("", "activations, one parameter's temporary copies and the libraries come on top."),
    ]
    return "\n".join(f"{name:<20} {text}".rstrip() for name, text in rows)


def _check(plan: Plan, target: Target, model: str, skeleton: dict[str, nn.Module]) -> None:
    """Refuse what the run would refuse, from files that hold no weights. Raises UserError."""
    import diffusers
    import transformers

    layout = plan.job.model_config if Path(model).is_file() else model
    with explained("--model", model):
        index = diffusers.DiffusionPipeline.load_config(layout)
        kind = family(check_index(index, layout))
        sampler = getattr(diffusers, index["scheduler"][1])
        parts = skeleton | {kind.part: skeleton["network"]}
        parts["scheduler"] = sampler.from_config(sampler.load_config(layout, subfolder="scheduler"))
        if plan.method.reads_words:
            reader = getattr(transformers, index["tokenizer"][1])
            parts["tokenizer"] = reader.from_pretrained(layout, subfolder="tokenizer")
    check_job(plan, target.sources.forget, kind, parts, int(os.environ.get("WORLD_SIZE", "1")))


def outline(model: str, config: str | None) -> dict[str, nn.Module]:
    """Return every part of the pipeline that has weights, on the meta device; the one to erase from is "network"."""
    from diffusers import DiffusionPipeline

    layout = check_single_file(model, config) if Path(model).is_file() else model
    check_place(layout, "--model" if layout == model else "--model_config")
    parts: dict[str, nn.Module] = {}
    with explained("--model", model), torch.device("meta"):
        index = DiffusionPipeline.load_config(layout)
        kind = family(check_index(index, layout))
        for name in kind.needed:
            if index[name][0]:
                part = _part(layout, name, *index[name])
                if part is not None:
                    parts["network" if name == kind.part else name] = part
    return parts


def _part(layout: str, name: str, library: str, cls: str) -> nn.Module | None:
    """Return one part made from its configuration, or None for what has no weights."""
    import diffusers
    import transformers

    of = getattr({"diffusers": diffusers, "transformers": transformers}[library], cls)
    if not issubclass(of, nn.Module):
        return None
    if library == "diffusers":
        return of.from_config(of.load_config(layout, subfolder=name))
    return of(transformers.AutoConfig.from_pretrained(layout, subfolder=name))


def sizes(network: nn.Module, others: dict[str, nn.Module], plan: Plan) -> Sizes:
    """Return the numbers of parameters that the plan's scopes select. Raises UserError as `select` does."""
    losses = plan.used_losses()
    trained = select(network, losses.train_scope)
    trimmable = trimmed(network, losses.trim_scope, trained)
    ranked = select(network, losses.rank_scope) if losses.rank_scope else trimmable
    return Sizes(
        network=_count(network.parameters()),
        others=sum(_count(part.parameters()) for part in others.values()),
        trained=_count(trained.values()),
        trimmable=_count(trimmable.values()),
        ranked=_count(ranked.values()),
        touched=_count((trained | trimmable | ranked).values()),
    )


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def memory(n: Sizes, plan: Plan, accelerator: bool) -> dict[str, dict[str, int]]:
    """Return bytes of tensors by phase and purpose, on the accelerator if there is one, else of the whole process."""
    width = _width(plan)
    held = {"weights": width * n.network}
    if not accelerator:
        held["other parts"] = 4 * n.others
    if plan.used_losses().anchor_model == "original":
        held["original network"] = (2 if accelerator else width) * n.network
    phases = {"sampling": {"weights": 4 * n.network, "other parts": 4 * n.others}}
    for phase, own in plan.method.memory(n, width).items():
        phases[phase] = held | own
    return phases


def _width(plan: Plan) -> int:
    """Return the bytes of a weight of the network."""
    return 4 if plan.job.weights_dtype == "float32" else 2


def _trim(n: Sizes, plan: Plan) -> str:
    k = round(plan.method.fraction * n.ranked)
    share = f"{100 * n.trimmable / n.network:.1f} % of the network, --trim_scope {plan.losses.trim_scope}"
    return f"of the top {k:,} of {n.ranked:,} ranked entries those in the {n.trimmable:,} trimmable: {share}"


def _images(plan: Plan, target: Target) -> str:
    """Say how many images are sampled to learn from, and to look at the model before and after."""
    s = plan.sampling
    sets = [1, 1] if plan.method.words_only else [s.forget_images, s.retain_images]
    if s.anchor_pictures:
        sets.append(s.forget_images)
    batches = sum(math.ceil(size / s.sample_batch_size) for size in sets)
    seen = len(target.shown)
    if isinstance(target, PocketTarget):
        seen += len(target.questions)
    return (
        f"{sum(sets):,} in {batches} batches of {s.sample_steps} steps to learn from; {seen} before and {seen} after"
    )


def _measured(plan: Plan) -> int:
    """Return the number of batches whose gradients are averaged before the first step."""
    return plan.method.sensitivity_passes * plan.method.sensitivity_batches


def _steps(plan: Plan) -> str:
    method, b = plan.method, plan.losses.batch_size
    how = "" if method.optimizer is None else f", {method.optimizer}"
    return f"{_measured(plan)} sensitivity batches, then {method.steps} steps of {b} + {b} samples{how}"


def _checkpoints(n: Sizes, plan: Plan) -> str:
    every, method = plan.running.checkpointing_steps, plan.method
    written = math.ceil(method.steps / every) + _measured(plan) // every
    if method.sensitivity_passes or method.trims():
        written += 1
    kept = plan.running.checkpoints_total_limit or "all"
    width = _width(plan)
    state = method.memory(n, width).get("steps", {})
    size = width * n.touched + state.get("optimizer", 0) + state.get("kept by the method", 0)
    return f"{written}, one each {every} steps, {size / GIB:.2f} GiB each, {kept} kept"


def _sum(parts: dict[str, int]) -> str:
    terms = []
    for name, size in parts.items():
        if size:
            terms.append(f"{name} {size / GIB:.2f}")
    return f"{sum(parts.values()) / GIB:.2f} GiB = {' + '.join(terms)}"
