"""--dry_run: what a job does and needs, from the model's configuration files alone; nothing is drawn or written."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from erase_sd.denoising import concept as subject
from erase_sd.models.checks import check_index, check_place, check_single_file, explained
from erase_sd.models.families import family
from erase_sd.models.parameters import select, without_norms
from erase_sd.plan import Plan

GIB = 2**30
STATE = {"sgd": 0, "adamw": 8, "adamw8bit": 2, "paged-adamw8bit": 2}  # bytes per trained entry; momentum 4 more
KEPT = {"salun": 5, "selective-amnesia": 8}  # bytes per trained entry: mask and old value, Fisher and old value
STORED = {"scissorhands": 1, "erasediff": 1}  # gradients kept besides the one that is computed


class Sizes(NamedTuple):
    """Numbers of parameters."""

    network: int
    others: int  # text encoders and autoencoder
    trained: int
    trimmable: int
    ranked: int
    touched: int  # those of the network that have a gradient


def describe(plan: Plan, model: str) -> str:
    """The lines that --dry_run prints. Raises UserError for a model or a request that cannot be carried out."""
    asked = subject.resolve(plan.job)
    skeleton = outline(model, plan.job.model_config)
    network = skeleton.pop("network")
    n = sizes(network, skeleton, plan)
    phases = memory(n, plan, torch.accelerator.is_available())
    peak = max(phases, key=lambda name: sum(phases[name].values()))
    rows = [
        ("network", f"{type(network).__name__}, {n.network:,} parameters; the other parts have {n.others:,}"),
        ("trained", f"{n.trained:,} ({100 * n.trained / n.network:.1f} %), --train_scope {plan.losses.train_scope}"),
        *_trim(n, plan),
        ("pictures", _pictures(plan, asked)),
        ("steps", _steps(plan)),
        ("checkpoints", _checkpoints(n, plan)),
        *((f"memory, {name}", _sum(parts) + (" <- peak" if name == peak else "")) for name, parts in phases.items()),
        ("", f"The peak is {sum(phases[peak].values()) / (4 * n.network):.2f} times the network's fp32 weights;"),
        ("", "activations, one parameter's temporary copies and the libraries come on top."),
    ]
    return "\n".join(f"{name:<20} {text}".rstrip() for name, text in rows)


def outline(model: str, config: str | None) -> dict[str, nn.Module]:
    """Every part of the pipeline that has weights, on the meta device; the one to be erased is called "network"."""
    from diffusers import DiffusionPipeline

    layout = check_single_file(model, config) if Path(model).is_file() else model
    check_place(layout, "--model" if layout == model else "--model_config")
    with explained("--model", model), torch.device("meta"):
        index = DiffusionPipeline.load_config(layout)
        kind = family(check_index(index, layout))
        parts = {name: _part(layout, name, *index[name]) for name in kind.needed if index[name][0]}
    network = parts.pop(kind.part)
    return {"network": network} | {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def _part(layout: str, name: str, library: str, cls: str) -> nn.Module | None:
    """One part from its configuration, or None for what has no weights."""
    import diffusers
    import transformers

    of = getattr({"diffusers": diffusers, "transformers": transformers}[library], cls)
    if not issubclass(of, nn.Module):
        return None
    if library == "diffusers":
        return of.from_config(of.load_config(layout, subfolder=name))
    return of(transformers.AutoConfig.from_pretrained(layout, subfolder=name))


def sizes(network: nn.Module, others: dict[str, nn.Module], plan: Plan) -> Sizes:
    """What the plan's scopes select. Raises UserError as `select` does."""
    losses = plan.used_losses()
    trained = select(network, losses.train_scope)
    trimmable = without_norms(network, select(network, losses.trim_scope))
    ranked = select(network, losses.rank_scope) if losses.rank_scope else trimmable
    count = lambda parameters: sum(p.numel() for p in parameters)  # noqa: E731
    return Sizes(
        network=count(network.parameters()),
        others=sum(count(part.parameters()) for part in others.values()),
        trained=count(trained.values()),
        trimmable=count(trimmable.values()),
        ranked=count(ranked.values()),
        touched=count((trained | trimmable | ranked).values()),
    )


def memory(n: Sizes, plan: Plan, accelerator: bool) -> dict[str, dict[str, int]]:
    """Bytes of tensors by phase and purpose, on the accelerator if there is one, else of the whole process."""
    method, width = plan.method, 4 if plan.job.weights_dtype == "float32" else 2
    others = {} if accelerator else {"other parts": 4 * n.others}
    held = {"weights": width * n.network} | others
    if plan.used_losses().anchor_model == "original":
        held["original network"] = (2 if accelerator else width) * n.network
    phases = {"sampling": {"weights": 4 * n.network, "other parts": 4 * n.others}}
    if passes := _passes(plan):
        averaged = n.trained if plan.job.method == "salun" else n.ranked
        phases["sensitivity"] = held | {"gradient": 4 * n.touched, "running means": 4 * passes * averaged}
    if hasattr(method, "optimizer"):
        momentum = 4 if method.optimizer == "sgd" and method.momentum else 0
        state = STATE[method.optimizer] + momentum + (2 if method.rounding == "kahan" else 0)
        after = width if getattr(method, "projection", "off") == "after-preconditioning" else 0
        phases["steps"] = held | {
            "gradient": 4 * n.touched,
            "stored gradient": 4 * n.trained * STORED.get(plan.job.method, 0),
            "optimiser": state * n.trained,
            "kept by the method": (KEPT.get(plan.job.method, 0) + after) * n.trained,
        }
    return phases


def _passes(plan: Plan) -> int:
    """Gradients that are averaged before the first step."""
    if plan.job.method == "salun":
        return 1
    if not plan.trims() or plan.method.saliency in ("magnitude", "random"):
        return 0
    return 3 if plan.method.saliency == "contrast" else 1


def _trim(n: Sizes, plan: Plan) -> list[tuple[str, str]]:
    if not plan.trims():
        return []
    k = round(plan.method.fraction * n.ranked)
    share = f"{100 * n.trimmable / n.network:.1f} % of the network, --trim_scope {plan.losses.trim_scope}"
    trimmed = f"of the top {k:,} of {n.ranked:,} ranked entries those in the {n.trimmable:,} trimmable: {share}"
    return [("trimmed", trimmed)]


def _pictures(plan: Plan, asked: subject.Target) -> str:
    s, seen = plan.sampling, len(asked.shown) + len(getattr(asked, "questions", ()))
    sets = [1, 1] if getattr(plan.method, "words_only", False) else [s.forget_images, s.retain_images]
    sets += [s.forget_images] if s.anchor_pictures else []
    batches = sum(math.ceil(size / s.sample_batch_size) for size in sets)
    return (
        f"{sum(sets):,} in {batches} batches of {s.sample_steps} steps to learn from; {seen} before and {seen} after"
    )


def _steps(plan: Plan) -> str:
    measured = _passes(plan) * getattr(plan.method, "sensitivity_batches", 0)
    steps, b = getattr(plan.method, "steps", 1), plan.losses.batch_size
    how = f", {plan.method.optimizer}" if hasattr(plan.method, "optimizer") else ""
    return f"{measured} sensitivity batches, then {steps} steps of {b} + {b} samples{how}"


def _checkpoints(n: Sizes, plan: Plan) -> str:
    every, steps = plan.running.checkpointing_steps, getattr(plan.method, "steps", 1)
    written = math.ceil(steps / every) + _passes(plan) * getattr(plan.method, "sensitivity_batches", 0) // every
    written += bool(_passes(plan) or plan.trims())
    kept = plan.running.checkpoints_total_limit or "all"
    width = 4 if plan.job.weights_dtype == "float32" else 2
    state = memory(n, plan, True).get("steps", {})
    size = width * n.touched + state.get("optimiser", 0) + state.get("kept by the method", 0)
    return f"{written}, one each {every} steps, {size / GIB:.2f} GiB each, {kept} kept"


def _sum(parts: dict[str, int]) -> str:
    terms = " + ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
    return f"{sum(parts.values()) / GIB:.2f} GiB = {terms}"
