"""Peak memory of a repair step against what --dry_run predicts of it, on the CPU, each size in a fresh process."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator

from erase_sd.core.repair import repair
from erase_sd.denoising.task import DenoisingTask
from erase_sd.dry_run import Outline, demand, sizes
from erase_sd.models.families import family
from erase_sd.plan import Plan, make
from eval.timing.clock import line
from eval.timing.fakes import samples, text_width, unet
from eval.timing.fresh import resident, run
from eval.timing.settings import Network, TimingSuite

MICRO_BATCHES = (1, 2)
KIND = "StableDiffusionPipeline"
TARGET = "0.85 to 1.15"
SMALL = (8, 8, 16, 16)  # channels of a network with which the libraries load their code before anything is measured


def lines(suite: TimingSuite, network: Network) -> Iterator[str]:
    """Yield prediction / measurement at each size of latents and micro-batch, and with checkpointing."""
    widths = network.channels()
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 16)  # glibc gives freed tensors back instead of collecting holes
    for side in network.latents:
        for n in MICRO_BATCHES:
            for checkpointing in (False, True) if n == 1 else (False,):
                predicted = prediction(widths, side, n, checkpointing)
                measured = run(measurement, widths, side, n, checkpointing)
                how = ", computed twice" if checkpointing else ""
                what = f"repair step, latents {side}x{side}, {n} at a time{how}, predicted / measured peak"
                detail = f"{predicted / 2**30:.2f} / {measured / 2**30:.2f} GiB"
                yield line("activations", what, predicted / measured, TARGET, detail)


def job(n: int, checkpointing: bool) -> Plan:
    """Return the smallest job with two graphs a step: SGD on the whole network, nothing constrained, no teacher."""
    return make(
        concept="cat",
        preset="paper",
        fraction=0.0,
        steps=1,
        objective="redirect",
        projection="off",
        anchor_model="current",
        train_scope="full",
        optimizer="sgd",
        batch_size=n,
        gradient_checkpointing=checkpointing,
    )


def prediction(widths: tuple[int, ...], side: int, n: int, checkpointing: bool) -> int:
    """Return the bytes that --dry_run counts for the job."""
    plan = job(n, checkpointing)
    with torch.device("meta"):
        pipe = Outline(unet(widths, side), {}, family(KIND), (4, side, side))
    count = sizes(pipe.network, {}, plan)
    return demand(pipe, count, plan, accelerator=False, autocast=False).peak(n, checkpointing)


def measurement(widths: tuple[int, ...], side: int, n: int, checkpointing: bool) -> int:
    """Return the peak bytes of the job in this process, beyond those of the libraries; Linux only."""
    step(SMALL, 8, 1, checkpointing)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak until now: it becomes what is resident
    step(widths, side, n, checkpointing)
    return resident("VmHWM") - before


def step(widths: tuple[int, ...], side: int, n: int, checkpointing: bool) -> None:
    """Carry out one step of the job on random latents."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    plan = job(n, checkpointing)
    rest = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = PNDMScheduler(steps_offset=1)
    pipe = StableDiffusionPipeline(unet=unet(widths, side), scheduler=scheduler, requires_safety_checker=False, **rest)
    if checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    made = samples(n, side, text_width(widths))
    task = DenoisingTask(pipe, made, plan.used_losses(), 0, Accelerator(cpu=True))
    for _ in repair(task, plan.method):
        pass
    task.release()
