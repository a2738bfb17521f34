"""erase(pipe, concept, ...): the one public verb. Concept -> samples -> task -> method -> record."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn

from erase_sd.common.errors import UserError
from erase_sd.common.files import digest
from erase_sd.common.processes import accelerator as make_accelerator
from erase_sd.common.processes import best_precision, check_precision, tracked
from erase_sd.core.descent import measure
from erase_sd.core.optimizers import make_optimizer
from erase_sd.denoising.concept import resolve
from erase_sd.denoising.feasible import check_job
from erase_sd.denoising.results import RunResult, write_results
from erase_sd.denoising.samples import collect
from erase_sd.denoising.sharded import wanted
from erase_sd.denoising.task import LESS, DenoisingTask
from erase_sd.models import guidance
from erase_sd.models.checks import check_editable
from erase_sd.models.families import family, modules, network, sampling_defaults
from erase_sd.models.foreign import Artefacts, put
from erase_sd.models.pipeline import load_network
from erase_sd.models.placement import half_precision, parking, placed, sampling_on, training
from erase_sd.plan import FREE, Plan, make
from erase_sd.pocket import FOLDER as POCKET
from erase_sd.run.folder import Progress, RunFolder
from erase_sd.run.loop import execute
from erase_sd.run.record import run_record, weights_hash
from erase_sd.settings import Job
from prompts import Example

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


FEWER = {"eval_forget": 32, "eval_retain": 80}  # pictures that erase() scores: a fast method need not wait for more


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
    if model == "pocket":
        knobs = FEWER | knobs
    plan = make(concept=concept, model=model, method=method, output_dir=output_dir and str(output_dir), **knobs)
    if plan.running.dry_run:
        raise UserError("dry_run is for the command line: python -m erase_sd.train --dry_run")
    if accelerator and plan.running.report_to:
        raise UserError("report_to is for the accelerator that erase makes: give log_with to yours instead")
    made = accelerator or make_accelerator(
        best_precision(plan.job.mixed_precision), plan.running.report_to, output_dir
    )
    return carry_out(pipe, plan, made)


def carry_out(
    pipe: DiffusionPipeline, plan: Plan, accelerator: Accelerator, tell: Callable[[str], object] | None = None
) -> dict:
    """Carry out the job of `erase`, planned. Exits with 128 + signal when stopped, after a checkpoint.

    The first process tells how each concept was understood, before anything is drawn.
    """
    _start_from(pipe, plan.job, accelerator)
    erasure = Erasure(pipe, plan, accelerator)
    if tell and accelerator.is_main_process:
        for one in erasure.target.understood:
            tell(str(one))
    running = plan.running
    folder = None
    if plan.job.output_dir:
        folder = RunFolder(
            plan.job.output_dir,
            erasure.config,
            writes=accelerator.is_main_process,
            limit=running.checkpoints_total_limit,
            start=running.resume_from_checkpoint,
            free=FREE,
        )
    erasure.folder = folder
    with placed(list(modules(pipe).values()), parking(accelerator.device)):
        return execute(
            plan.method,
            erasure.task(),
            folder,
            erasure.finish,
            wait=accelerator.wait_for_everyone,
            every=running.checkpointing_steps,
            description=plan.job.method,
            images=plan.step_samples(),
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


def _retain_loss(task: DenoisingTask, step: int) -> float:
    return measure(task, task.retain, task.batch("repair", step), "retain")


class Erasure:
    """One job of `erase`: what comes before the method's own steps, and after them."""

    folder: RunFolder | None = None

    def __init__(self, pipe: DiffusionPipeline, plan: Plan, accelerator: Accelerator) -> None:
        self.start = time.monotonic()
        self.pipe, self.plan, self.accelerator = pipe, plan, accelerator
        self.target = resolve(plan.job, plan.sampling.resolution)
        _check(pipe, plan, self.target.sources.forget, accelerator)
        hashes = []
        for part in modules(pipe).values():
            hashes.append(weights_hash(part))
        self.base_hash = digest(hashes + guidance.identity(network(pipe)))
        own = {"mixed_precision": accelerator.mixed_precision, "base_hash": self.base_hash}
        defaults = sampling_defaults(family(pipe), network(pipe))
        usual = {"sample_guidance": defaults.guidance, "sample_steps": defaults.steps}
        usual["picture_steps"] = defaults.shown_steps
        if plan.job.has_own_data():
            own["own_data"] = self.target.sources.identity()
        self.config = plan.config(usual) | own
        self.method_seconds = 0.0  # without previews and scores
        self.micro_batch = 0  # samples of each set that were computed at once, at the end

    @contextmanager
    def task(self) -> Iterator[tuple[DenoisingTask, dict[str, nn.Parameter]]]:
        """Sample what the method learns from; yield the task and the weights that it may change."""
        job, pipe, device = self.plan.job, self.pipe, self.accelerator.device
        parts, drawn = list(modules(pipe).values()), self.base_hash
        if half := half_precision(device):
            drawn += f" {half}"  # other pictures than in fp32
        cache = self.folder and self.folder.path.parent / ".cache"
        with tracked(self.accelerator, self.config):
            with sampling_on(network(pipe), parts, device):
                self.before = self.target.preview(pipe, drawn, cache, "before")
                sources, only_words = self.target.sources, self.plan.method.words_only
                samples = collect(pipe, sources, self.plan.sampling, job.seed, drawn, cache, only_words)
            start = time.monotonic()
            dtype = getattr(torch, job.weights_dtype)
            with training(network(pipe), parts, parking(device), dtype, job.gradient_checkpointing), _explained():
                sharded = wanted(self.accelerator, job.fsdp) and self.plan.method.trains
                losses, method = self.plan.used_losses(), self.plan.method
                task = DenoisingTask(pipe, samples, losses, job.seed, self.accelerator, sharded, job.low_memory)
                try:
                    task.ask_beforehand(method.ask_original, method.steps)
                    yield task, task.trimmable() | task.trainable()
                    task.assemble()
                finally:
                    self.micro_batch = task.micro_batch
                    task.release()
            self.method_seconds = time.monotonic() - start

    def finish(self, progress: Progress) -> dict:
        """Write the results of a run that came to its end, and return its record."""
        with sampling_on(network(self.pipe), list(modules(self.pipe).values()), self.accelerator.device):
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
            micro_batch=self.micro_batch,
            parameters=parameters,
            reinitialised=sum(progress.changed.values()),
            understood=self.target.record(),
            scores=self.target.scores(self.before, after),
        )
        if self.folder and self.folder.writes:
            result = RunResult(record, progress, self.before, after, self.target.hidden, self.target.sources)
            write_results(self.pipe, self.plan, self.folder, result)
        return record

    def take_over(self, folder: RunFolder) -> None:
        """Put the result of a complete run into the pipeline."""
        folder.forget_checkpoints()  # where the run was killed between its last word and this
        model = network(self.pipe)
        erased = load_network(str(folder.path), family(self.pipe).part, model.dtype)
        model.load_state_dict(erased.state_dict())
        guidance.copy(erased, model)


@contextmanager
def _explained() -> Iterator[None]:
    """Turn memory that ran out where no smaller micro-batch helps, as for the optimizer's state, into a UserError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"the network and the optimizer's state are too large for this device: {LESS}") from error


def _check(pipe: DiffusionPipeline, plan: Plan, examples: Iterable[Example], accelerator: Accelerator) -> None:
    """Refuse, before anything is sampled or written, what would fail only in training. Raises UserError."""
    check_editable(pipe)
    model, part = network(pipe), family(pipe).part
    check_precision(accelerator.mixed_precision)
    if model.dtype not in (torch.float32, getattr(torch, plan.job.weights_dtype)):
        raise UserError(f"the {part} is {model.dtype}: load it in float32, mixed_precision saves the same time")
    check_job(plan, examples, family(pipe), pipe.components, accelerator.num_processes)
    optimizer = plan.method.optimizer
    if optimizer is None:
        return
    if wanted(accelerator, plan.job.fsdp) and "8bit" in optimizer:
        raise UserError(f"--optimizer {optimizer} keeps blocks that cross the shards of --fsdp: use adamw or sgd")
    try:
        make_optimizer({"probe": nn.Parameter(torch.zeros(1, device=accelerator.device))}, plan.method)
    except UserError as error:
        if plan.job.low_memory:
            raise UserError(f"--low_memory keeps Adam's moments in 8 bits: {error}") from error
        raise
