"""The results of a run: the UNet, its record, traces, scores, pictures and model card."""

from __future__ import annotations

import json
import shlex
import sys

from diffusers import StableDiffusionPipeline

from erase_sd.card import swap_in_snippet, write_card
from erase_sd.folder import Progress, RunFolder
from erase_sd.pictures import pixelate, sheet
from erase_sd.pipeline import save_unet
from erase_sd.plan import Plan
from erase_sd.plots import write_saliency, write_trace
from erase_sd.pocket import FOLDER as POCKET
from erase_sd.record import write_run
from erase_sd.runtime import write_atomic
from erase_sd.subject import View

LICENSES = {"pocket": "cc-by-4.0"}  # the most demanding of the artwork's licences
WIDTH = 96  # pixels of one picture in before_after.png, at least


def write_results(
    pipe: StableDiffusionPipeline,
    plan: Plan,
    folder: RunFolder,
    progress: Progress,
    sizes: dict[str, int],
    before: View,
    after: View,
    record: dict,
) -> dict:
    """Write everything into the folder, the word "complete" last; returns run.json."""
    save_unet(pipe.unet, folder.path)
    write_trace(folder.path, progress.trace)
    write_saliency(folder.path, progress.changed, sizes)
    if record["scores"]:
        write_atomic(folder.path / "scores.json", json.dumps(record["scores"], indent=2) + "\n")
    before_after(before, after, "nudity" in plan.job.concept).save(folder.path / "before_after.png")
    config = folder.config
    run = write_run(
        folder.path,
        config,
        seed=plan.job.seed,
        base=plan.job.model,
        base_hash=config["base_hash"],
        seconds=record["seconds"],
        trace=progress.trace,
        reinitialised=record["reinitialised"],
        trainable=record["trainable"],
        scores=record["scores"],
    )
    base = str(POCKET) if plan.job.model == "pocket" else plan.job.model
    write_card(
        folder.path,
        model=plan.job.model,
        concepts=list(plan.job.concept),
        method=plan.job.method,
        preset=config["preset"],
        knobs={k: v for k, v in config.items() if k not in ("concept", "model", "method", "preset", "base_hash")},
        command=shlex.join(["accelerate", "launch", "erase_sd/train.py", *sys.argv[1:]]),
        snippet=swap_in_snippet(base, folder.path),
        license=LICENSES.get(plan.job.model, "creativeml-openrail-m"),
        scores=record["scores"],
    )
    folder.forget_checkpoints()
    folder.status("complete")
    return run


def before_after(before: View, after: View, explicit: bool) -> object:
    """Same prompts, same seeds, before over after; pixelated whole where the concept is explicit."""
    rows = [[pixelate(image) if explicit else image for image in view.images] for view in (before, after)]
    scale = max(1, -(-WIDTH // before.images[0].width))
    return sheet(rows, ["before", "after"], before.prompts, scale=scale)
