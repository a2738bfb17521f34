"""erase(pipe, concept, ...): the one public verb. Concept -> samples -> task -> method -> record."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from erase_sd.common.errors import UserError
from erase_sd.common.files import digest
from erase_sd.common.processes import accelerator as make_accelerator
from erase_sd.common.processes import tracked
from erase_sd.core.optimizers import make_optimizer
from erase_sd.denoising.concept import resolve
from erase_sd.denoising.results import RunResult, write_results
from erase_sd.denoising.samples import collect
from erase_sd.denoising.sharded import wanted
from erase_sd.denoising.task import DenoisingTask, trimmed
from erase_sd.models import guidance
from erase_sd.models.families import family, modules, network
from erase_sd.models.foreign import Artefacts, put
from erase_sd.models.noise import check_scheduler
from erase_sd.models.parameters import select, without_norms
from erase_sd.models.pipeline import load_network
from erase_sd.models.placement import placed, training
from erase_sd.plan import Plan, make
from erase_sd.pocket import FOLDER as POCKET
from erase_sd.run.folder import Progress, RunFolder
from erase_sd.run.loop import execute
from erase_sd.run.record import run_record, weights_hash
from erase_sd.settings import Job

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


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
    """Make `pipe` unable to show `concept`, in place, and return the record of the run.

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
    """Carry out the job of `erase`, planned. Exits with 128 + signal when stopped, after a checkpoint."""
    _start_from(pipe, plan.job, accelerator)
    erasure = Erasure(pipe, plan, accelerator)
    running = plan.running
    folder = None
    if plan.job.output_dir:
        folder = RunFolder(
            plan.job.output_dir,
            erasure.config,
            writes=accelerator.is_main_process,
            limit=running.checkpoints_total_limit,
            start=running.resume_from_checkpoint,
        )
    erasure.folder = folder
    with placed(list(modules(pipe).values()), accelerator.device):
        return execute(
            plan.method,
            erasure.task(),
            folder,
            erasure.finish,
            wait=accelerator.wait_for_everyone,
            every=running.checkpointing_steps,
            description=plan.job.method,
            images=2 * plan.losses.batch_size,  # forget and retain samples, over all processes
            log=accelerator.log,
            probe=_retain_loss,
            reuse=erasure.take_over,
        )


def _start_from(pipe: DiffusionPipeline, job: Job, accelerator: Accelerator) -> None:
    """Put what the job starts from into the pipeline and say what it is. Raises UserError where it does not fit."""
    stored = {family(pipe).part} | ({"text_encoder"} if job.text_encoder else set())
    for applied in put(pipe, Artefacts(job.unet, job.text_encoder, job.adapter)):
        if beside := applied.parts - stored:
            raise UserError(
                f"{applied.line}: a run does not store the {min(beside)} that this changes: merge the adapter into it "
                "and give that as --text_encoder"
            )
        if accelerator.is_main_process:
            print(applied.line, file=sys.stderr)


def _retain_loss(task: DenoisingTask, step: int) -> Tensor:
    return task.retain(task.batch("repair", step))


class Erasure:
    """One job of `erase`: what comes before the method's own steps, and after them."""

    folder: RunFolder | None = None

    def __init__(self, pipe: DiffusionPipeline, plan: Plan, accelerator: Accelerator) -> None:
        self.start = time.monotonic()
        self.pipe, self.plan, self.accelerator = pipe, plan, accelerator
        self.target = resolve(plan.job, plan.sampling.resolution)
        _check(pipe, plan, accelerator)
        hashes = []
        for part in modules(pipe).values():
            hashes.append(weights_hash(part))
        self.base_hash = digest(hashes + guidance.identity(network(pipe)))
        own = {"mixed_precision": accelerator.mixed_precision, "base_hash": self.base_hash}
        self.config = plan.config() | own
        self.method_seconds = 0.0  # without previews and scores

    @contextmanager
    def task(self) -> Iterator[tuple[DenoisingTask, dict[str, nn.Parameter]]]:
        """Sample what the method learns from; yield the task and the weights that it may change."""
        job, pipe, device = self.plan.job, self.pipe, self.accelerator.device
        cache = self.folder and self.folder.path.parent / ".cache"
        with tracked(self.accelerator, self.config):
            self.before = self.target.preview(pipe, self.base_hash, cache, "before")
            samples = collect(
                pipe,
                self.target.sources,
                self.plan.sampling,
                job.seed,
                self.base_hash,
                cache,
                self.plan.method.words_only,
            )
            start = time.monotonic()
            dtype, parts = getattr(torch, job.weights_dtype), list(modules(pipe).values())
            with training(network(pipe), parts, device, dtype, job.gradient_checkpointing):
                sharded = wanted(self.accelerator, job.fsdp) and self.plan.method.trains
                task = DenoisingTask(pipe, samples, self.plan.used_losses(), job.seed, self.accelerator, fsdp=sharded)
                try:
                    yield task, task.trimmable() | task.trainable()
                    task.assemble()
                finally:
                    task.release()
            self.method_seconds = time.monotonic() - start

    def finish(self, progress: Progress) -> dict:
        """Write the results of a run that came to its end, and return its record."""
        after = self.target.preview(self.pipe, self.base_hash + " erased", None, "after")
        parameters = 0
        for p in network(self.pipe).parameters():
            parameters += p.numel()
        record = run_record(
            self.config,
            seed=self.plan.job.seed,
            base=self.plan.job.model,
            base_hash=self.base_hash,
            seconds=time.monotonic() - self.start,
            method_seconds=round(self.method_seconds, 2),
            trace=progress.trace,
            parameters=parameters,
            reinitialised=sum(progress.changed.values()),
            scores=self.target.scores(self.before, after),
        )
        if self.folder and self.folder.writes:
            result = RunResult(record, progress, self.before, after, self.target.hidden)
            write_results(self.pipe, self.plan, self.folder, result)
        return record

    def take_over(self, folder: RunFolder) -> None:
        """Put the result of a complete run into the pipeline."""
        folder.forget_checkpoints()  # where the run was killed between its last word and this
        model = network(self.pipe)
        erased = load_network(str(folder.path), family(self.pipe).part, model.dtype)
        model.load_state_dict(erased.state_dict())
        guidance.copy(erased, model)


def _check(pipe: DiffusionPipeline, plan: Plan, accelerator: Accelerator) -> None:
    """Refuse, before anything is sampled or written, what would fail only in training. Raises UserError."""
    model, part = network(pipe), family(pipe).part
    if model.dtype not in (torch.float32, getattr(torch, plan.job.weights_dtype)):
        raise UserError(f"the {part} is {model.dtype}: load it in float32, mixed_precision saves the same time")
    check_scheduler(pipe)
    losses = plan.losses
    for scope in (losses.trim_scope, losses.rank_scope or "full", losses.train_scope):
        select(model, scope)
    if plan.method.trims():
        _check_trim(model, plan)
    optimizer = plan.method.optimizer
    if optimizer is None:
        return
    if wanted(accelerator, plan.job.fsdp) and "8bit" in optimizer:
        raise UserError(f"--optimizer {optimizer} keeps blocks that cross the shards of --fsdp: use adamw or sgd")
    make_optimizer({"probe": nn.Parameter(torch.zeros(1, device=accelerator.device))}, plan.method)


def _check_trim(model: nn.Module, plan: Plan) -> None:
    """Refuse a trim of nothing, and one that was asked for where nothing is trained. Raises UserError."""
    scope, training_scope = plan.losses.trim_scope, plan.losses.train_scope
    asked = without_norms(model, select(model, scope))
    if not asked:
        raise UserError(f"--trim_scope {scope} holds norms only, which are never re-initialised: widen it")
    repaired = trimmed(model, scope, select(model, training_scope))
    outside = sorted(asked.keys() - repaired.keys())
    if outside and (plan.chose_trim_scope() or not repaired):
        raise UserError(
            f"--trim_scope {scope} re-initialises {outside[0]}, which --train_scope {training_scope} never repairs: "
            "narrow the first or widen the second"
        )
