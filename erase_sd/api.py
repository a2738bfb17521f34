"""erase(pipe, concept, ...): the one public verb. Concept -> samples -> task -> method -> record."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import nn

from erase_sd.common.errors import UserError
from erase_sd.common.files import digest
from erase_sd.common.processes import accelerator as make_accelerator
from erase_sd.common.processes import tracked
from erase_sd.common.signals import StopFlag
from erase_sd.core.optimizers import make_optimizer
from erase_sd.core.task import first_lost
from erase_sd.denoising import concept as subject
from erase_sd.denoising.results import RunResult, write_results
from erase_sd.denoising.samples import Samples, collect
from erase_sd.denoising.sharded import wanted
from erase_sd.denoising.task import DenoisingTask
from erase_sd.models import guidance
from erase_sd.models.families import family, modules, network
from erase_sd.models.parameters import select, without_norms
from erase_sd.models.pipeline import load_network
from erase_sd.models.placement import placed, training
from erase_sd.plan import Plan, make
from erase_sd.pocket import FOLDER as POCKET
from erase_sd.run.folder import Progress, RunFolder
from erase_sd.run.loop import run
from erase_sd.run.record import run_record, weights_hash


def erase(
    pipe: DiffusionPipeline,
    concept: str | tuple[str, ...],
    method: str = "scissorhands",
    *,
    model: str = "",
    output_dir: str | Path | None = None,
    accelerator: Accelerator | None = None,
    **knobs: Any,
) -> dict:
    """Make `pipe` unable to draw `concept`, in place, and return the record of the run.

    `knobs` are the command line's options ("preset", "lr", "steps", ...); `model` names the pipeline in the record, by
    default as it was loaded. Files are written only below `output_dir`, which makes the run resumable, and into .cache
    beside it, which runs there share. Components return to the devices they came from. Raises UserError for a request
    that cannot be carried out, and when a loss or weight is no longer finite: `pipe` is lost then, load it again.
    """
    model = model or pipe.name_or_path or "a pipeline in memory"
    model = "pocket" if Path(model).resolve() == POCKET else model
    plan = make(concept=concept, model=model, method=method, output_dir=output_dir and str(output_dir), **knobs)
    if plan.running.dry_run:
        raise UserError("dry_run is for the command line: python -m erase_sd.train --dry_run")
    if accelerator and plan.running.report_to:
        raise UserError("report_to is for the accelerator that erase makes: give log_with to yours instead")
    made = accelerator or make_accelerator(plan.job.mixed_precision, plan.running.report_to, output_dir)
    return carry_out(pipe, plan, made)


def carry_out(pipe: DiffusionPipeline, plan: Plan, accelerator: Accelerator) -> dict:
    """The job of `erase`, planned. Exits with 128 + signal when stopped, after a checkpoint."""
    start, job = time.monotonic(), plan.job
    asked = subject.resolve(job, plan.sampling.resolution)
    _check(pipe, plan, accelerator)
    parts = list(modules(pipe).values())
    base_hash = digest([weights_hash(part) for part in parts] + guidance.identity(network(pipe)))
    config = plan.config() | {"mixed_precision": accelerator.mixed_precision, "base_hash": base_hash}
    main = accelerator.is_main_process
    limit, checkpoint = plan.running.checkpoints_total_limit, plan.running.resume_from_checkpoint
    place = RunFolder(job.output_dir, config, main, limit, checkpoint) if job.output_dir else nullcontext()
    with StopFlag(), place as folder, placed(parts, accelerator.device):  # one flag from here to the end
        accelerator.wait_for_everyone()  # all see the folder alike: before the run, or after
        if folder and (done := folder.complete()):
            _take_over(pipe, folder)
            return done
        with _recorded(folder), tracked(accelerator, config):
            cache = folder and folder.path.parent / ".cache"
            before = asked.look(pipe, base_hash, cache, "before")
            samples = collect(pipe, asked.sources, plan.sampling, job.seed, base_hash, cache, plan.method.words_only)
            progress, method_seconds = _train(pipe, plan, samples, accelerator, folder)
            after = asked.look(pipe, base_hash + " erased", None, "after")
            record = run_record(
                config,
                seed=job.seed,
                base=job.model,
                base_hash=base_hash,
                seconds=time.monotonic() - start,
                method_seconds=round(method_seconds, 2),
                trace=progress.trace,
                parameters=sum(p.numel() for p in network(pipe).parameters()),
                reinitialised=sum(progress.changed.values()),
                scores=asked.scores(before, after),
            )
            if folder and main:
                write_results(pipe, plan, folder, RunResult(record, progress, before, after, asked.explicit))
    return record


def _take_over(pipe: DiffusionPipeline, folder: RunFolder) -> None:
    """Put the result of a complete run into the pipeline."""
    folder.forget_checkpoints()  # where the run was killed between its last word and this
    erased = load_network(str(folder.path), family(pipe).part, network(pipe).dtype)
    network(pipe).load_state_dict(erased.state_dict())
    guidance.copy(erased, network(pipe))


def _check(pipe: DiffusionPipeline, plan: Plan, accelerator: Accelerator) -> None:
    """Refuse, before anything is drawn or written, what would fail only in training. Raises UserError."""
    model, part = network(pipe), family(pipe).part
    if model.dtype not in (torch.float32, getattr(torch, plan.job.weights_dtype)):
        raise UserError(f"the {part} is {model.dtype}: load it in float32, mixed_precision saves the same time")
    scopes = plan.losses.trim_scope, plan.losses.rank_scope or "full", plan.losses.train_scope
    trimmed, *_ = (without_norms(model, select(model, scope)) for scope in scopes)
    if plan.method.trims() and not trimmed:
        raise UserError(f"--trim_scope {scopes[0]} holds norms only, which are never re-initialised: widen it")
    optimizer = plan.method.optimizer
    if optimizer is None:
        return
    if wanted(accelerator, plan.job.fsdp) and "8bit" in optimizer:
        raise UserError(f"--optimizer {optimizer} keeps blocks that cross the shards of --fsdp: use adamw or sgd")
    make_optimizer({"probe": nn.Parameter(torch.zeros(1, device=accelerator.device))}, plan.method)


def _train(
    pipe: DiffusionPipeline, plan: Plan, samples: Samples, accelerator: Accelerator, folder: RunFolder | None
) -> tuple[Progress, float]:
    """Run the method from its last checkpoint to its end; the seconds are its own, without pictures and scores."""
    start = time.monotonic()
    dtype, parts = getattr(torch, plan.job.weights_dtype), list(modules(pipe).values())
    with training(network(pipe), parts, accelerator.device, dtype, plan.job.gradient_checkpointing):
        sharded = wanted(accelerator, plan.job.fsdp) and plan.method.trains
        task = DenoisingTask(pipe, samples, plan.used_losses(), plan.job.seed, accelerator, fsdp=sharded)
        weights = task.trimmable() | task.trainable()
        try:
            progress = run(
                plan.method,
                task,
                weights,
                folder,
                every=plan.running.checkpointing_steps,
                check=lambda step: _check_finite(task, weights, step),
                description=plan.job.method,
                images=2 * plan.losses.batch_size,  # forget and retain samples, over all processes
                log=accelerator.log,
            )
            task.assemble()
        finally:
            task.release()
    return progress, time.monotonic() - start


@torch.no_grad()
def _check_finite(task: DenoisingTask, weights: dict[str, nn.Parameter], step: int) -> None:
    """Raise FloatingPointError if the last step lost the model, which the loop itself would notice in the next one."""
    if name := first_lost(weights, task.shards):
        raise FloatingPointError(f"after {step} steps {name} holds NaN or infinity")
    if not task.mean(task.retain(task.batch("repair", step))).isfinite():  # finite weights can be too large to compute
        raise FloatingPointError(f"after {step} steps the retain loss is not finite")


@contextmanager
def _recorded(folder: RunFolder | None) -> Iterator[None]:
    """Leave the truth in status.json whatever ends the run; the launcher turns every exit code into 1."""
    if folder:
        folder.status("running")
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
    except Exception as error:
        if folder:
            folder.status("failed", 1, f"{type(error).__name__}: {error}")
        raise
