"""erase(pipe, concept, ...): the one public verb. Concept -> samples -> task -> method -> record."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from tqdm.auto import tqdm

from erase_sd import subject
from erase_sd.denoising import DenoisingTask
from erase_sd.folder import Progress, RunFolder
from erase_sd.groups import select
from erase_sd.latents import Samples, collect
from erase_sd.plan import Plan, make
from erase_sd.record import environment, weights_hash
from erase_sd.report import write_results
from erase_sd.process import StopFlag, UserError
from erase_sd.runtime import digest


def erase(
    pipe: StableDiffusionPipeline,
    concept: str | tuple[str, ...],
    method: str = "scissorhands",
    *,
    model: str = "",
    output_dir: str | Path | None = None,
    accelerator: Accelerator | None = None,
    **knobs: Any,
) -> dict:
    """Make `pipe` unable to draw `concept`, in place, and return the record of the run.

    `knobs` are the command line's options ("preset", "lr", "steps", ...); `model` names the pipeline in the record,
    "pocket" for the embedded one. Files are written only below `output_dir`, which makes the run resumable. Components
    return to the devices they came from. Raises UserError for a request that cannot be carried out.
    """
    named = {"model": model} if model else {}
    plan = make(concept=concept, method=method, output_dir=output_dir and str(output_dir), **named, **knobs)
    return carry_out(pipe, plan, accelerator or Accelerator(mixed_precision=plan.job.mixed_precision))


def carry_out(pipe: StableDiffusionPipeline, plan: Plan, accelerator: Accelerator) -> dict:
    """The job of `erase`, planned. Exits with 128 + signal when stopped, after a checkpoint."""
    start, job = time.monotonic(), plan.job
    asked = subject.resolve(job)
    base_hash = digest([weights_hash(part) for part in (pipe.unet, pipe.text_encoder, pipe.vae)])
    config = plan.config() | {"mixed_precision": accelerator.mixed_precision, "base_hash": base_hash}
    with RunFolder(job.output_dir, config) if job.output_dir else nullcontext() as folder, _placed(pipe, accelerator):
        if folder and (done := folder.complete()):
            return done
        if folder:
            folder.status("running")
        cache = folder and folder.path.parent / ".cache"
        with _recorded(folder):
            before = asked.look(pipe, base_hash, cache, "before")
            samples = collect(pipe, asked.sources, plan.sampling, job.seed, base_hash, cache)
            sizes = {name: p.numel() for name, p in pipe.unet.named_parameters()}
            progress = _train(pipe, plan, samples, accelerator, folder)
            after = asked.look(pipe, base_hash, None, "after")
            record = {
                "config": config,
                "seconds": round(time.monotonic() - start, 1),
                "reinitialised": sum(progress.changed.values()),
                "trainable": sum(p.numel() for p in select(pipe.unet, plan.losses.train_scope).values()),
                "scores": asked.scores(before, after),
                "environment": environment(),
            }
            if folder:
                record = write_results(pipe, plan, folder, progress, sizes, before, after, record)
    return record


def _train(
    pipe: StableDiffusionPipeline, plan: Plan, samples: Samples, accelerator: Accelerator, folder: RunFolder | None
) -> Progress:
    """Run the method from its last checkpoint to its end."""
    task = DenoisingTask(pipe, samples, plan.losses, plan.job.seed, accelerator)
    weights = task.trimmable() | task.trainable()
    progress = folder and folder.resume(weights)
    state, trace, changed = progress or Progress(None, [], {})
    steps = plan.method.steps
    try:
        with StopFlag() as stop, tqdm(total=steps, initial=len(trace), desc=plan.job.method, unit="step") as bar:
            for record, state in plan.method(task, state):
                if "changed" in record:
                    changed = record["changed"]
                    bar.set_postfix_str(f"{sum(changed.values()):,} entries re-initialised")
                else:
                    trace.append({k: None if isinstance(v, float) and math.isnan(v) else v for k, v in record.items()})
                    bar.update()
                    bar.set_postfix({k: f"{v:.3g}" for k in ("loss_r", "cos", "c") if (v := trace[-1][k]) is not None})
                due = state["step"] and (state["step"] % plan.job.checkpointing_steps == 0 or state["step"] == steps)
                if folder and (due or stop.is_set()):
                    folder.save(weights, Progress(state, trace, changed))
                if stop.is_set():
                    raise SystemExit(128 + stop.signum)
    except FloatingPointError as error:
        raise UserError(f"{error}: the model is lost, nothing was saved; lower --lr, --lam or --fraction") from error
    finally:
        pipe.unet.requires_grad_(False).zero_grad(set_to_none=True)
    return Progress(state, trace, changed)


@contextmanager
def _recorded(folder: RunFolder | None) -> Iterator[None]:
    """Leave the truth in status.json whatever ends the run; the launcher turns every exit code into 1."""
    try:
        yield
    except UserError as error:
        if folder:
            folder.status("failed", 2, str(error))
        raise
    except (SystemExit, KeyboardInterrupt) as error:
        if folder:
            folder.status("stopped", getattr(error, "code", 130), "run the same command again to go on")
        raise


@contextmanager
def _placed(pipe: StableDiffusionPipeline, accelerator: Accelerator) -> Iterator[None]:
    """Move the pipeline to the accelerator's device and put every component back where it was."""
    parts = [part for part in pipe.components.values() if hasattr(part, "parameters")]
    places = [part.device for part in parts]
    grads = [[p.requires_grad for p in part.parameters()] for part in parts]
    for part in parts:
        part.to(accelerator.device)
    try:
        yield
    finally:
        for part, place, flags in zip(parts, places, grads, strict=True):
            part.to(place)
            for p, flag in zip(part.parameters(), flags, strict=True):
                p.requires_grad_(flag)
