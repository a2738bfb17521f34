"""The results of a run: the network, traces, scores, images before and after, and the model card."""

from __future__ import annotations

import io
import json
import shlex
from typing import TYPE_CHECKING, NamedTuple

import torch
from PIL import Image

from erase_sd.common.files import new_folder, write_atomic
from erase_sd.common.imaging import pixelate, sheet
from erase_sd.denoising.card import CardFacts, measuring_commands, portable, swap_in_snippet, write_card
from erase_sd.denoising.concept import Preview
from erase_sd.denoising.license import license_of
from erase_sd.denoising.samples import Sources
from erase_sd.models import guidance
from erase_sd.models.families import family, network
from erase_sd.models.pipeline import save_network
from erase_sd.plan import Plan
from erase_sd.run.folder import Progress, RunFolder
from erase_sd.run.plots import write_saliency, write_trace
from erase_sd.run.record import finite
from prompts import called

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

WIDTH = 96  # pixels of one image in before_after.png, at least
NAMED = {"concept", "model", "method", "preset", "base_hash"}  # apart from the other options in the card


class RunResult(NamedTuple):
    """What a run leaves behind besides the weights."""

    run: dict
    progress: Progress
    before: Preview
    after: Preview
    hidden: tuple[bool, ...]  # which of the prompts' images are shown pixelated
    sources: Sources  # what was asked of the model: the concept's captions with their anchors


def write_results(pipe: DiffusionPipeline, plan: Plan, folder: RunFolder, result: RunResult) -> None:
    """Write into the folder all but the record itself, which follows when everything else is there."""
    dtype = getattr(torch, plan.job.weights_dtype)
    save_network(network(pipe), folder.path, family(pipe).part, dtype)
    if guided := guidance.carried(network(pipe)):
        guidance.save(guided, folder.path)
    if plan.job.text_encoder:  # the network alone would not draw what the run saw
        with new_folder(folder.path / "text_encoder") as temporary:
            pipe.text_encoder.save_pretrained(str(temporary))
    write_trace(folder.path, result.progress.trace)
    if changed := result.progress.changed:
        sizes = {}
        for name, p in network(pipe).named_parameters():
            sizes[name] = p.numel()
        write_saliency(folder.path, changed, sizes)
    if scores := result.run["scores"]:
        write_atomic(folder.path / "scores.json", json.dumps(finite(scores), indent=2) + "\n")
    picture = io.BytesIO()
    before_after(result.before, result.after, result.hidden).save(picture, "png")
    write_atomic(folder.path / "before_after.png", picture.getvalue())
    _card(pipe, plan, folder, result)


def _card(pipe: DiffusionPipeline, plan: Plan, folder: RunFolder, result: RunResult) -> None:
    """Write the model card, in which no path is this machine's own."""
    base = "pocket" if plan.job.model == "pocket" else str(portable(plan.job.model))
    layout = plan.job.model_config and str(portable(plan.job.model_config))
    shown = str(portable(folder.path))
    given = [str(portable(text)) for text in plan.job.concept]
    options = {name: value for name, value in folder.config.items() if name not in NAMED}
    different = dict.fromkeys((example.caption, example.anchor) for example in result.sources.forget)
    facts = CardFacts(
        model=plan.job.model,
        concepts=list(map(called, plan.job.concept)),
        method=plan.job.method,
        preset=folder.config["preset"],
        knobs=options,
        command=shlex.join(["accelerate", "launch", "erase_sd/train.py", *map(str, map(portable, plan.options()))]),
        snippet=swap_in_snippet(pipe, base, folder.path, layout, shown=shown),
        license=license_of(plan.job.model),
        measuring=measuring_commands(given, base, family(pipe).part, shown),
        scores=result.run["scores"],
        understood=list(different),
        shown=result.before.prompts,
    )
    write_card(folder.path, facts)


def before_after(before: Preview, after: Preview, hidden: tuple[bool, ...]) -> Image.Image:
    """Return a sheet of the same prompts and seeds, before over after, with the hidden ones pixelated."""
    rows = []
    for images in (before.images, after.images):
        row = []
        for image, unseen in zip(images, hidden, strict=True):
            row.append(pixelate(image) if unseen else image)
        rows.append(row)
    scale = max(1, -(-WIDTH // before.images[0].width))
    return sheet(rows, ["before", "after"], before.prompts, scale=scale)
