"""--dry_run: what a job does and needs, from the model's configuration files alone; nothing is sampled or written."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from erase_sd.common.processes import best_precision
from erase_sd.denoising.concept import PocketTarget, Target, resolve
from erase_sd.denoising.feasible import check_job
from erase_sd.denoising.task import trimmed
from erase_sd.methods.base import Sizes
from erase_sd.models.activations import Activations, count, largest_micro_batch
from erase_sd.models.checks import check_index, check_place, check_single_file, explained
from erase_sd.models.families import Family, SamplingDefaults, family, sampling_defaults
from erase_sd.models.parameters import select
from erase_sd.models.placement import ROOM
from erase_sd.plan import Plan

GIB = 2**30
GPUS = (12, 16, 24, 40, 80)  # GB, as cards are sold: so many GiB, about
SHARE = 0.94  # of a card that tensors can have: the rest is the driver's, the libraries' and lost between blocks
TRAINED = ("sensitivity", "steps")  # phases in which graphs are alive


class Outline(NamedTuple):
    """A pipeline of which only the configuration was read: parts on the meta device, and what its network is given."""

    network: nn.Module
    others: dict[str, nn.Module]
    kind: Family
    latents: tuple[int, ...]  # (C, H, W) of a sample


class Demand(NamedTuple):
    """What a job asks of a device: bytes by phase and purpose, and what graphs keep in the phases that have some."""

    phases: dict[str, dict[str, int]]
    activations: Activations

    def peak(self, micro_batch: int, checkpointing: bool) -> int:
        """Return the bytes at the peak of the training, samples being computed so many at a time."""
        graph = self.activations.of(micro_batch, checkpointing)
        trained = [sum(parts.values()) + graph for phase, parts in self.phases.items() if phase in TRAINED]
        return max(trained, default=0)


def describe(plan: Plan, model: str) -> str:
    """Return the lines that --dry_run prints. Raises UserError for a model or a job that cannot be carried out."""
    target = resolve(plan.job, plan.sampling.resolution)
    pipe = outline(model, plan.job.model_config, plan.sampling.resolution)
    _check(plan, target, model, pipe)
    n = sizes(pipe.network, pipe.others, plan)
    device = torch.accelerator.is_available()
    here = demand(pipe, n, plan, device, best_precision(plan.job.mixed_precision) == "bf16")
    micro_batch = -(-plan.losses.batch_size // plan.losses.gradient_accumulation_steps)
    totals: dict[str, int] = {}
    for name, parts in here.phases.items():
        if name in TRAINED:
            parts[f"activations of {micro_batch}"] = here.activations.of(micro_batch, plan.job.gradient_checkpointing)
        totals[name] = sum(parts.values())
    peak = max(totals, key=totals.__getitem__)
    rows = [("concept", str(one)) for one in target.understood]
    rows += [
        ("network", f"{type(pipe.network).__name__}, {n.network:,} parameters; the other parts have {n.others:,}"),
        ("trained", f"{n.trained:,} ({100 * n.trained / n.network:.1f} %), --train_scope {plan.losses.train_scope}"),
    ]
    if plan.method.trims():
        rows.append(("trimmed", _trim(n, plan)))
    rows += [
        ("pictures", _images(plan, target, sampling_defaults(pipe.kind, pipe.network))),
        ("steps", _steps(plan)),
        ("checkpoints", _checkpoints(n, plan)),
    ]
    for name, parts in here.phases.items():
        rows.append((f"memory, {name}", _sum(parts) + (" <- peak" if name == peak else "")))
    rows += [
        ("", f"The peak is {totals[peak] / (4 * n.network):.2f} times the network's fp32 weights;"),
        ("", "one layer's temporary results and the libraries come on top."),
    ]
    for gigabytes, text in cards(pipe, n, plan):
        rows.append((f"on a {gigabytes} GB GPU", text))
    return "\n".join(f"{name:<20} {text}".rstrip() for name, text in rows)


def _check(plan: Plan, target: Target, model: str, pipe: Outline) -> None:
    """Refuse what the run would refuse, from files that hold no weights. Raises UserError."""
    import diffusers
    import transformers

    layout = plan.job.model_config if Path(model).is_file() else model
    with explained("--model", model):
        index = diffusers.DiffusionPipeline.load_config(layout)
        sampler = getattr(diffusers, index["scheduler"][1])
        parts: dict[str, Any] = pipe.others | {pipe.kind.part: pipe.network}
        parts["scheduler"] = sampler.from_config(sampler.load_config(layout, subfolder="scheduler"))
        if plan.method.reads_words:
            reader = getattr(transformers, index["tokenizer"][1])
            parts["tokenizer"] = reader.from_pretrained(layout, subfolder="tokenizer")
    check_job(plan, target.sources.forget, pipe.kind, parts, int(os.environ.get("WORLD_SIZE", "1")))


def demand(pipe: Outline, n: Sizes, plan: Plan, accelerator: bool, autocast: bool) -> Demand:
    """Return what a job asks of an accelerator or of the whole process, with the network's matrices in bf16 or not."""
    kept = Activations(0, 0)
    if plan.method.sensitivity_passes or plan.method.optimizer:
        losses = plan.used_losses()
        scopes = {losses.train_scope, losses.trim_scope, losses.rank_scope or losses.trim_scope}
        touched = [name for scope in scopes for name in select(pipe.network, scope)]
        dtype = getattr(torch, plan.job.weights_dtype)
        kept = count(pipe.network, pipe.kind, touched, pipe.latents, dtype, autocast)
    return Demand(memory(n, plan, accelerator, autocast), kept)


def cards(pipe: Outline, n: Sizes, plan: Plan) -> Iterator[tuple[int, str]]:
    """Yield, for GPUs of several sizes in GB, how the job runs there by itself, and if it does not, with what."""
    autocast = plan.job.mixed_precision in (None, "bf16")
    ways = [("", demand(pipe, n, plan, True, autocast))]
    if not plan.job.low_memory:
        ways.append(("by --low_memory, ", demand(pipe, n, plan.lean(), True, autocast)))
    drawn = 2 * n.network + 4 * n.others
    for gigabytes in GPUS:
        usable = SHARE * gigabytes * GIB
        how = _way(plan, ways, usable)
        if drawn > ROOM * usable:
            how += "; pictures are drawn with one part of the model there at a time"
        yield gigabytes, how


def _way(plan: Plan, ways: list[tuple[str, Demand]], usable: float) -> str:
    """Return the first way in which the training fits: fewer samples at a time, then checkpointing, then the next."""
    for name, job in ways:
        for checkpointing in sorted({plan.job.gradient_checkpointing, True}):

            def fits(micro_batch: int, job: Demand = job, checkpointing: bool = checkpointing) -> bool:
                return job.peak(micro_batch, checkpointing) <= usable

            batch = plan.losses.batch_size if checkpointing == plan.job.gradient_checkpointing else 1
            if found := largest_micro_batch(batch, fits):
                size = job.peak(found, checkpointing) / GIB
                how = ", activations computed twice" if checkpointing else ""
                return f"{name}{found} of {plan.losses.batch_size} samples at a time{how}: {size:.1f} GiB"
    return "too large, even by --low_memory: train less of it, such as --train_scope xattn"


def outline(model: str, config: str | None, side: int | None = None) -> Outline:
    """Return every part of the pipeline that has weights, on the meta device; `side` is of a picture, in pixels."""
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
                    parts[name] = part
    network = parts.pop(kind.part)
    return Outline(network, parts, kind, kind.latents(network.config, parts["vae"].config, side))


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


def memory(n: Sizes, plan: Plan, accelerator: bool, autocast: bool = False) -> dict[str, dict[str, int]]:
    """Return bytes of tensors by phase and purpose, on the accelerator if there is one, else of the whole process.

    What graphs keep is not among them.
    """
    width = _width(plan)
    held = {"weights": width * n.network}
    if not accelerator:
        held["other parts"] = 4 * n.others
    if plan.used_losses().anchor_model == "original" and not plan.job.low_memory:
        held["original network"] = (2 if autocast else width) * n.network
    drawn = 2 if accelerator else 4
    phases = {"sampling": {"weights": drawn * n.network, "other parts": 4 * n.others}}
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


def _images(plan: Plan, target: Target, usual: SamplingDefaults) -> str:
    """Say how many images are sampled to learn from, and to look at the model before and after."""
    s, own = plan.sampling, target.sources
    forget = len(own.forget_pictures) or s.forget_images
    sets = [] if own.forget_pictures else [forget]
    if not own.retain_pictures:
        sets.append(s.retain_images)
    if plan.method.words_only:
        sets = [1] * len(sets)
    if s.anchor_pictures:
        sets.append(forget)
    batches = sum(math.ceil(size / s.sample_batch_size) for size in sets)
    seen = len(target.shown)
    if isinstance(target, PocketTarget):
        seen += len(target.questions)
    steps, yours = s.sample_steps or usual.steps, len(own.forget_pictures) + len(own.retain_pictures)
    text = f"{sum(sets):,} in {batches} batches of {steps} steps to learn from"
    text += f" and {yours:,} of yours" if yours else ""
    return f"{text}; {seen} before and {seen} after"


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
