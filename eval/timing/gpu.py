"""On a GPU: images a second, a repair step and its share of the hardware's peak, with torch.compile and without."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import torch

from erase_sd.models.pipeline import sample
from eval.timing.clock import interleaved, line, operations, ratio
from eval.timing.fakes import pipeline, task
from eval.timing.fresh import run
from eval.timing.settings import Network, TimingSuite
from eval.timing.step import ENDLESS, finetuning, repairing

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0, "RTX 4090": 165.0}  # dense bf16, TFLOP/s
STEPS, GUIDANCE = 50, 7.5


def lines(suite: TimingSuite, network: Network) -> Iterator[str]:
    """Yield the results; nothing but a word about it where there is no CUDA device."""
    if not torch.cuda.is_available():
        yield "gpu: left out, there is no CUDA device here"
        return
    yield from run(collected, suite, network)


def collected(suite: TimingSuite, network: Network) -> list[str]:
    """Return all results at once: accelerate knows one precision per process, and the other benchmarks use another."""
    return list(measured(suite, network))


def measured(suite: TimingSuite, network: Network) -> Iterator[str]:
    """Yield results plainly and compiled: ratios are compiled / plain and repair / fine-tuning."""
    peak = network.peak_tflops or peak_of(torch.cuda.get_device_name() if torch.cuda.is_available() else "")
    rates, steps = [], []
    for compiled in (False, True):
        pipe = pipeline(network.channels(), network.gpu_latents)
        count = network.gpu_batch * counted(network, pipe)
        if compiled:
            pipe.unet.compile()
        plain, repair, memory = repaired(suite, network, pipe)
        flops = f"{count / median(repair) / 1e12:.1f} TFLOP/s"
        share = f", {count / median(repair) / 1e12 / peak:.1%} of {peak:g}" if peak else ", give --peak_tflops for MFU"
        what = f"{network.gpu_batch} + {network.gpu_batch} samples, bf16"
        if compiled:
            what += ", compiled"
        detail = f"{median(repair):.3f} s; {flops}{share}; {memory / 2**30:.1f} GiB"
        yield line("gpu", f"ascent, {what}, time / fine-tuning", ratio(repair, plain), "<= 1.15", detail)
        steps.append(median(repair))
        rates.append(sampling_rate(suite, network, pipe))
    yield line("gpu", "repair step's time, compiled / not", steps[1] / steps[0], "", f"{steps[1]:.3f} s")
    detail = f"{rates[1]:.2f} / {rates[0]:.2f} images/s, {STEPS} steps with guidance and decoding, bf16"
    yield line("gpu", "images a second, compiled / not", rates[1] / rates[0], "", detail)


def counted(network: Network, pipe: StableDiffusionPipeline) -> int:
    """Return the operations of a repair step on one sample of each set."""
    job = task(pipe, 1, network.gpu_latents, "bf16")
    needed = operations(repairing(job, ENDLESS))
    job.release()
    return needed


def repaired(
    suite: TimingSuite, network: Network, pipe: StableDiffusionPipeline
) -> tuple[list[float], list[float], int]:
    """Return the seconds of fine-tuning and repair steps, and the peak of allocated bytes."""
    job = task(pipe, network.gpu_batch, network.gpu_latents, "bf16")
    ways = {"plain": finetuning(job), "repair": repairing(job, ENDLESS)}
    interleaved(ways, 2)  # warms up, and compiles
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    seconds = interleaved(ways, suite.rounds)
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    job.release()
    return seconds["plain"], seconds["repair"], memory


def sampling_rate(suite: TimingSuite, network: Network, pipe: StableDiffusionPipeline) -> float:
    """Return images a second, in bf16 throughout."""
    pipe = pipe.to("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)
    prompts, seeds = ["a photo of a cat"] * network.gpu_batch, list(range(network.gpu_batch))
    way = partial(sample, pipe, prompts, seeds, steps=STEPS, guidance=GUIDANCE, batch_size=network.gpu_batch)
    interleaved({"sampling": way}, 1)  # warms up
    return network.gpu_batch / median(interleaved({"sampling": way}, suite.rounds)["sampling"])


def peak_of(name: str) -> float | None:
    """Return the peak of the GPU of this name, TFLOP/s, None if it is not in the table."""
    for card, peak in PEAKS.items():
        if card in name:
            return peak
    return None
