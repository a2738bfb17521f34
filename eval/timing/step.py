"""A repair step of the main job against a plain fine-tuning step on as many samples, on the same network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from torch.nn.functional import mse_loss

from erase_sd.common.rng import generator
from erase_sd.core.repair import Repair, repair
from erase_sd.denoising.task import DenoisingTask
from eval.timing.clock import interleaved, line, operations, ratio
from eval.timing.fakes import pipeline, task
from eval.timing.settings import Network, TimingSuite

ENDLESS = Repair(steps=1 << 30, lr=1e-9)  # Algorithm 1 to the letter, which is ascent, by plain SGD
REDIRECT = replace(ENDLESS, objective="redirect")
GOALS = {"ascent": "<= 1.15 where compute dominates", "redirect": ""}


def lines(suite: TimingSuite, network: Network) -> Iterator[str]:
    """Yield ascent's and redirect's ratios at every size of latents, beside their ratio of operations."""
    for side in network.latents:
        pipe = pipeline(network.channels(), side, layers=1)
        job = task(pipe, network.samples, side)
        ways = {"plain": finetuning(job), "ascent": repairing(job, ENDLESS), "redirect": repairing(job, REDIRECT)}
        counts = {name: operations(way) for name, way in ways.items()}  # which warms up as well
        seconds = interleaved(ways, suite.rounds)
        for name, goal in GOALS.items():
            times, plain = median(seconds[name]), median(seconds["plain"])
            what = f"{name}, {side}x{side} latents, {network.samples} + {network.samples} samples, "
            detail = f"{times:.3f} s / {plain:.3f} s; operations {counts[name] / counts['plain']:.3f}"
            yield line("step", what + "time / fine-tuning", ratio(seconds[name], seconds["plain"]), goal, detail)


def repairing(job: DenoisingTask, options: Repair) -> Callable[[], object]:
    """Return the main job's own loop, a step at a time."""
    return partial(next, repair(job, options))


def finetuning(job: DenoisingTask) -> Callable[[], None]:
    """Return what diffusers' train_text_to_image.py does in a step, on forget and retain samples in one batch."""
    samples, device = job.samples, job.accelerator.device
    latents = torch.cat([samples.forget, samples.retain]).to(device)
    rows = torch.cat([samples.caption, samples.keep])
    text = {name: table[rows].to(device) for name, table in samples.embeddings.items()}
    optimizer = torch.optim.SGD(job.model.parameters(), lr=ENDLESS.lr, fused=True)
    draw = generator(0, "fine-tuning")

    def step() -> None:
        noise = torch.randn(latents.shape, generator=draw).to(device)
        t = torch.randint(1000, (len(latents),), generator=draw).to(device)
        prediction = job.predict(job.add_noise(latents, noise, t), t, text)
        job.accelerator.backward(mse_loss(prediction, job.target(latents, noise, t)))
        optimizer.step()
        optimizer.zero_grad()

    return step
