"""A repair step on cached latents and text embeddings against one that encodes pictures and captions in the loop."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import median

import torch
from diffusers import StableDiffusionPipeline

from erase_sd.common.rng import generator
from erase_sd.core.repair import repair
from erase_sd.denoising.task import DenoisingBatch, DenoisingTask
from eval.timing.clock import interleaved, line, operations, ratio
from eval.timing.fakes import PIXELS, TOKENS, pipeline, task
from eval.timing.settings import Network, TimingSuite
from eval.timing.step import ENDLESS


def lines(suite: TimingSuite, network: Network) -> Iterator[str]:
    """How much of what the operation counts promise is missing."""
    side, n = network.cached_latents, network.cached_samples
    pipe = pipeline(network.channels(), side)
    jobs = {"cached": task(pipe, n, side), "encoding": encoding(task(pipe, n, side), pipe)}
    ways = {name: partial(next, repair(job, ENDLESS)) for name, job in jobs.items()}
    cached, whole = (operations(way) for way in ways.values())  # which warms up as well
    seconds = interleaved(ways, suite.rounds)
    times, counts = ratio(*seconds.values()), cached / whole
    with_, without = (median(each) for each in seconds.values())
    what = f"{side}x{side} latents, {n} + {n} samples, cached / encoding in the loop, time less operations"
    detail = f"time {times:.3f} = {with_:.3f} s / {without:.3f} s; operations {counts:.3f}"
    yield line("caching", what, times - counts, "<= 0.05", detail)


def encoding(job: DenoisingTask, pipe: StableDiffusionPipeline) -> DenoisingTask:
    """The same task, whose batches encode as many pictures and captions as they hold latents and embeddings."""
    n, side, draw = job.settings.batch_size, job.samples.forget.shape[-1], generator(0, "caching")
    pixels = torch.rand(2 * n, 3, PIXELS * side, PIXELS * side, generator=draw) * 2 - 1
    words = torch.randint(pipe.text_encoder.config.vocab_size, (2 * n, TOKENS), generator=draw)
    cached = job.batch

    @torch.no_grad()
    def batch(purpose: str, step: int) -> DenoisingBatch:
        z = pipe.vae.encode(pixels).latent_dist.sample(draw) * pipe.vae.config.scaling_factor
        c_f, c_r = ({"encoder_hidden_states": c} for c in pipe.text_encoder(words)[0].split(n))
        return cached(purpose, step)._replace(z_f=z[:n], z_r=z[n:], c_f=c_f, c_r=c_r)

    job.batch = batch
    return job
