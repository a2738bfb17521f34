"""A repair step on cached latents and text embeddings against one that encodes pictures and captions in the loop."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import torch

from erase_sd.common.rng import generator
from erase_sd.core.repair import repair
from erase_sd.denoising.task import DenoisingBatch, DenoisingTask
from eval.timing.clock import interleaved, line, operations, ratio
from eval.timing.fakes import PIXELS, TOKENS, pipeline, task
from eval.timing.settings import Network, TimingSuite
from eval.timing.step import ENDLESS

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline


def lines(suite: TimingSuite, network: Network) -> Iterator[str]:
    """Yield how much of what the operation counts promise is missing."""
    side, n = network.cached_latents, network.cached_samples
    pipe = pipeline(network.channels(), side)
    cached = task(pipe, n, side)
    encoded = encoding(task(pipe, n, side), pipe)
    ways = {"cached": partial(next, repair(cached, ENDLESS)), "encoding": partial(next, repair(encoded, ENDLESS))}
    counts = operations(ways["cached"]) / operations(ways["encoding"])  # which warms up as well
    seconds = interleaved(ways, suite.rounds)
    times = ratio(seconds["cached"], seconds["encoding"])
    with_, without = median(seconds["cached"]), median(seconds["encoding"])
    what = f"{side}x{side} latents, {n} + {n} samples, cached / encoding in the loop, time less operations"
    detail = f"time {times:.3f} = {with_:.3f} s / {without:.3f} s; operations {counts:.3f}"
    yield line("caching", what, times - counts, "<= 0.05", detail)


def encoding(job: DenoisingTask, pipe: StableDiffusionPipeline) -> DenoisingTask:
    """Return the same task, whose batches encode as many pictures and captions as they hold latents and embeddings."""
    n, side = job.settings.batch_size, job.samples.forget.shape[-1]
    draw = generator(0, "caching")
    pixels = torch.rand(2 * n, 3, PIXELS * side, PIXELS * side, generator=draw) * 2 - 1
    words = torch.randint(pipe.text_encoder.config.vocab_size, (2 * n, TOKENS), generator=draw)
    cached = job.batch

    @torch.no_grad()
    def batch(purpose: str, step: int) -> DenoisingBatch:
        z = pipe.vae.encode(pixels).latent_dist.sample(draw) * pipe.vae.config.scaling_factor
        c_f, c_r = pipe.text_encoder(words)[0].split(n)
        conds = {"c_f": {"encoder_hidden_states": c_f}, "c_r": {"encoder_hidden_states": c_r}}
        return cached(purpose, step)._replace(z_f=z[:n], z_r=z[n:], **conds)

    job.batch = batch
    return job
