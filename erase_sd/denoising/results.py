"""The results of a run: the UNet, its record, traces, scores, pictures and model card."""

from __future__ import annotations

import io
import json
import shlex
from typing import NamedTuple

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from erase_sd.common.files import write_atomic
from erase_sd.common.imaging import pixelate, sheet
from erase_sd.common.signals import StopFlag
from erase_sd.denoising.card import swap_in_snippet, write_card
from erase_sd.denoising.concept import Preview
from erase_sd.models import guidance
from erase_sd.models.families import family, network
from erase_sd.models.pipeline import save_network
from erase_sd.plan import Plan
from erase_sd.pocket import FOLDER as POCKET
from erase_sd.run.folder import Progress, RunFolder
from erase_sd.run.plots import write_saliency, write_trace
from erase_sd.run.record import write_run

LICENSES = {"pocket": "cc-by-4.0"}  # the most demanding of the artwork's licences
WIDTH = 96  # pixels of one picture in before_after.png, at least
NAMED = {"concept", "model", "method", "preset", "base_hash"}  # told apart from the knobs in the card


class RunResult(NamedTuple):
    """What a run leaves behind besides the weights."""

    run: dict
    progress: Progress
    before: Preview
    after: Preview
    explicit: bool  # pictures are shown pixelated


def write_results(pipe: DiffusionPipeline, plan: Plan, folder: RunFolder, result: RunResult) -> None:
    """Write everything into the folder, the word "complete" last; until then a stopped run has its checkpoint."""
    dtype = getattr(torch, plan.job.weights_dtype)
    save_network(network(pipe), folder.path, family(pipe).part, dtype)
    if guided := guidance.carried(network(pipe)):
        guidance.save(guided, folder.path)
    write_trace(folder.path, result.progress.trace)
    if changed := result.progress.changed:
        write_saliency(folder.path, changed, {name: p.numel() for name, p in network(pipe).named_parameters()})
    if scores := result.run["scores"]:
        write_atomic(folder.path / "scores.json", json.dumps(scores, indent=2) + "\n")
    picture = io.BytesIO()
    before_after(result.before, result.after, result.explicit).save(picture, "png")
    write_atomic(folder.path / "before_after.png", picture.getvalue())
    _card(pipe, plan, folder, scores)
    with StopFlag() as stop:
        stop.leave()
    write_run(folder.path, result.run)
    folder.status("complete")
    folder.forget_checkpoints()


def _card(pipe: DiffusionPipeline, plan: Plan, folder: RunFolder, scores: dict | None) -> None:
    base = str(POCKET) if plan.job.model == "pocket" else plan.job.model
    write_card(
        folder.path,
        model=plan.job.model,
        concepts=list(plan.job.concept),
        method=plan.job.method,
        preset=folder.config["preset"],
        knobs={name: value for name, value in folder.config.items() if name not in NAMED},
        command=shlex.join(["accelerate", "launch", "erase_sd/train.py", *plan.options()]),
        snippet=swap_in_snippet(pipe, base, folder.path, plan.job.model_config),
        license=LICENSES.get(plan.job.model, "creativeml-openrail-m"),
        scores=scores,
    )


def before_after(before: Preview, after: Preview, explicit: bool) -> Image.Image:
    """Same prompts, same seeds, before over after; pixelated whole where the concept is explicit."""
    rows = [[pixelate(image) if explicit else image for image in view.images] for view in (before, after)]
    scale = max(1, -(-WIDTH // before.images[0].width))
    return sheet(rows, ["before", "after"], before.prompts, scale=scale)
