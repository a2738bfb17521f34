"""Peak resident memory of the whole main job, from the model folder to the saved run, in a fresh process."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from erase_sd import train
from erase_sd.common.errors import UserError
from eval.timing.clock import line
from eval.timing.fakes import pipeline
from eval.timing.fresh import resident, run
from eval.timing.settings import Network, TimingSuite

TARGETS = {"sgd": "<= 3.6", "adamw": "<= 5.6"}  # at SD v1.4's size; a small model is lost beside the libraries
SHORT = (
    "--concept cat --preset paper --anchor_model current --mixed_precision no --steps 3 --sensitivity_batches 2 "
    "--forget_images 2 --retain_images 2 --sample_steps 2 --sample_batch_size 1"
).split()


class Peak(NamedTuple):
    """Memory and time of one job."""

    libraries: int  # bytes resident before it looked at the model
    peak: int
    seconds: float


def lines(suite: TimingSuite, network: Network) -> Iterator[str]:
    """Yield the peak in multiples of the parameters' bytes, for SGD and for Adam."""
    with TemporaryDirectory() as root:
        model = Path(network.model_dir or Path(root, "model"))
        size = built(model, network)
        for optimizer, target in TARGETS.items():
            with TemporaryDirectory() as out:
                where = ["--model", str(model), "--output_dir", str(Path(out, "run"))]
                how = ["--optimizer", optimizer, "--batch_size", str(network.samples)]
                before = swapped()
                job = run(main_job, [*SHORT, *where, *how])
            without = (job.peak - job.libraries) / size
            detail = f"{job.peak / 2**30:.2f} GiB, {without:.3g} without the libraries; {job.seconds:.0f} s, "
            detail += f"{swapped() - before} pages swapped out meanwhile"
            what = f"main job, {optimizer}, {size // 4:,} parameters in fp32, peak / their bytes"
            yield line("memory", what, job.peak / size, target if network.full else "", detail)


def built(model: Path, network: Network) -> int:
    """Return the bytes of the UNet's parameters in the model folder, which is made unless it is there already."""
    if not (model / "model_index.json").is_file():
        if model.exists() and (not model.is_dir() or any(model.iterdir())):
            raise UserError(f"--model_dir {model} holds other files: name a new folder")
        run(build, model, network.channels(), network.job_latents)
    config = json.loads((model / "unet" / "config.json").read_text())
    there = tuple(config["block_out_channels"]), config["sample_size"]
    if there != (network.channels(), network.job_latents):
        raise UserError(f"--model_dir {model} holds a model with widths and latents {there}: name another folder")
    return parameters(model)


def build(model: Path, widths: tuple[int, ...], side: int) -> None:
    """Write the model's folder; run it in a process of its own, whose memory goes with it."""
    pipeline(widths, side, layers=1).save_pretrained(str(model))


def parameters(model: Path) -> int:
    """Return the bytes of the UNet's tensors, all fp32: its files less their headers."""
    size = 0
    for file in (model / "unet").glob("*.safetensors"):
        with file.open("rb") as stream:
            size += file.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")  # the format begins so
    return size


def main_job(words: list[str]) -> Peak:
    """Run the main job with these arguments in this process, quietly."""
    importlib.import_module("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")  # loads transformers too
    libraries, start = resident("VmRSS"), time.perf_counter()
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        train.main(words)
    return Peak(libraries, resident("VmHWM"), time.perf_counter() - start)


def swapped() -> int:
    """Return the pages that the system has swapped out since it started."""
    counts = dict(row.split() for row in Path("/proc/vmstat").read_text().splitlines())
    return int(counts.get("pswpout", 0))
