"""Erasing from a diffusion model as a Task: one denoising loss for every family of models, six ways to use it.

    L(z, c) = MSE(e_theta(x_t, t, c), target)        x_t and the target: erase_sd.models.noise

    forget    L(z_f, c_f)                                   Scissorhands' L_f
    retain    L(z_r, c_r)                                   Scissorhands' L_r
    preserve  MSE(e_theta(x_t, t, c_r), e_0(x_t, t, c_r))   the retain captions predicted as before
    redirect  MSE(e_theta(x_t, t, c_f), e_0(x_t, t, c_a))   the concept's caption predicted like its anchor's; at t_d
    guided    MSE((1 + w) e_theta(x_t, t, c_f) - w e_theta(x_t, t), target)         L_f under guidance, w = 7.5
    contrast  L(z_f, c_f) - L(z_f, c_a)                     what only the concept's words explain

z_f, z_r are latents, c_f, c_r their captions, c_a the anchor; e_0 is the original model.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm, trange

from erase_sd.common.errors import UserError
from erase_sd.common.rng import generator
from erase_sd.common.signals import StopFlag
from erase_sd.core.task import MicroBatch, Replicated, fitted
from erase_sd.denoising.answers import Answers
from erase_sd.denoising.samples import Samples
from erase_sd.denoising.sharded import Sharded
from erase_sd.models.families import Cond, family, network
from erase_sd.models.noise import ForwardProcess, forward_process
from erase_sd.models.parameters import select, without_norms
from erase_sd.settings import TaskSettings

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

ROUNDED = (nn.Linear, nn.Conv1d, nn.Conv2d)  # layers whose weights autocast rounds
LESS = "give --low_memory (bf16 weights, 8-bit Adam), or a smaller --train_scope, such as xattn"
# What accelerate sets on a model to autocast it; with the last one left, it would not prepare the model again.
WRAPPED = ("forward", "_original_forward", "_is_accelerate_prepared")


GUIDANCE = 7.5  # of `guided`, as published


class Prepared(Replicated):
    """A network that every rank holds in full: accelerate autocasts it and averages its gradients (DDP)."""

    def __init__(self, model: nn.Module, original: nn.Module | None, accelerator: Accelerator) -> None:
        self.model, self.original, self.dtype, self.accelerator = model, original, model.dtype, accelerator
        if accelerator.num_processes == 1:  # bf16 weights have gradients that add up in fp32; DDP's buckets cannot
            _set_grad_dtype(model, torch.float32)
        self._unwrapped: dict[str, Any] = {}
        for name in WRAPPED:
            if name in model.__dict__:
                self._unwrapped[name] = model.__dict__[name]
        self.forward = accelerator.prepare_model(model)

    def owned(self, params: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Return what this rank trains of these parameters: all of each."""
        return params

    def without_sync(self) -> AbstractContextManager:
        """Return a context in which no rank waits for the others' gradients."""
        return self.accelerator.no_sync(self.forward)

    def after_backward(self) -> None:
        """Do nothing: the gradients are in the parameters."""

    def assemble(self) -> None:
        """Do nothing: the result is in the pipeline's own network."""

    def release(self) -> None:
        """Undo what preparing the model did to it: no autocast in its forward, no gradients, no original beside it."""
        self.forward = self.original = None
        for name in WRAPPED:
            self.model.__dict__.pop(name, None)
        self.model.__dict__.update(self._unwrapped)
        self.model.requires_grad_(False).zero_grad(set_to_none=True)
        _set_grad_dtype(self.model, None)


def _set_grad_dtype(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Say in which precision gradients are kept, by default the parameters' own; torch before 2.10 keeps that one."""
    for p in model.parameters():
        p.grad_dtype = dtype or p.dtype


class DenoisingTask:
    """A `core.task.DiffusionTask`. Every draw is keyed by (seed, purpose, step, global sample index).

    `shards` say where the parameters are, and run the network there. The scopes of `settings` are resolved and may
    raise UserError, as does a batch that leaves a micro-batch empty. With `fsdp` every rank holds its rows of each
    parameter; the pipeline's own network waits on the CPU for the result. With `beforehand` no copy of the original
    model is made: `ask_beforehand` has it answer, before any change, all that the run will ask.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        samples: Samples,
        settings: TaskSettings,
        seed: int,
        accelerator: Accelerator,
        fsdp: bool = False,
        beforehand: bool = False,
    ) -> None:
        self.samples, self.settings, self.seed, self.accelerator = samples, settings, seed, accelerator
        least = accelerator.num_processes * settings.gradient_accumulation_steps
        if settings.batch_size < least:
            raise UserError(f"--batch_size {settings.batch_size} leaves micro-batches empty: give {least} or more")
        self.parts = settings.gradient_accumulation_steps  # micro-batches of a batch: more when memory runs out
        self.family, self.process = family(pipe), forward_process(pipe)
        whole: nn.Module = network(pipe).requires_grad_(False)
        self.network = whole
        trainable = select(whole, settings.train_scope)
        trimmable = trimmed(whole, settings.trim_scope, trainable)
        ranked = select(whole, settings.rank_scope) if settings.rank_scope else trimmable
        for p in (trainable | trimmable | ranked).values():
            p.requires_grad_(True)
        whole.to("cpu" if fsdp else accelerator.device)
        original, self.answers = None, None
        if settings.anchor_model == "original":
            if beforehand:
                self.answers = Answers(whole.dtype)
            else:
                original = frozen_copy(whole, "no" if fsdp else accelerator.mixed_precision)  # shards are of one dtype
        kind = Sharded if fsdp else Prepared
        self.shards: Prepared | Sharded = kind(whole, original, accelerator)
        self.model: nn.Module = self.shards.model
        self._trainable = self.shards.owned(trainable)
        self._trimmable = self.shards.owned(trimmable)
        self._ranked = self.shards.owned(ranked)

    @torch.no_grad()
    def ask_beforehand(self, ask: Callable[[DenoisingTask, DenoisingBatch, int], None], steps: int) -> None:
        """Have the network, which is the original model yet, answer what ask(task, micro-batch, step) asks of it.

        Does nothing for a task that keeps the original model, or needs none. SystemExit after a step in which a signal
        came.
        """
        if self.answers is None:
            return
        hidden = {"disable": True} if os.environ.get("RANK", "0") != "0" else {}  # False would overrule TQDM_DISABLE
        for step in trange(steps, desc="original model", unit="step", **hidden):
            with StopFlag() as stop:
                fitted(self, partial(self._ask, ask, step))
                stop.leave()
        self.answers.open = False

    def _ask(self, ask: Callable[[DenoisingTask, DenoisingBatch, int], None], step: int) -> None:
        for part in self.micro_batches(self.batch("repair", step)):
            ask(self, part.batch, step)

    def assemble(self) -> None:
        """Bring the result into the pipeline's own network; every rank has to."""
        self.shards.assemble()

    def release(self) -> None:
        """Leave the pipeline's own network on the device, prepared for nothing, without gradients."""
        self.shards.release()

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the repair moves, in the model's order."""
        return self._trainable

    def trimmable(self) -> dict[str, nn.Parameter]:
        """Return the parameters that may be re-initialised, norms excluded, in the model's order."""
        return self._trimmable

    def ranked(self) -> dict[str, nn.Parameter]:
        """Return the parameters among which the most sensitive are looked for, in the model's order."""
        return self._ranked

    def batch(self, purpose: str, step: int) -> DenoisingBatch:
        """Return this rank's slice of the global batch of a step."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        draws = []
        for i in range(rank, self.settings.batch_size, ranks):
            draws.append(draw(self.samples, self.process, self.settings, generator(self.seed, purpose, step, i)))
        columns: dict[str, Any] = {}
        for name in draws[0]:
            column = torch.stack([sample[name] for sample in draws])
            columns[name] = self._cond(column) if name in CAPTIONS else column.to(self.accelerator.device)
        return DenoisingBatch(**columns)

    def micro_batches(self, batch: DenoisingBatch) -> Iterator[MicroBatch]:
        """Yield micro-batches of this rank's slice; DDP averages the gradients over the ranks at the last one only."""
        n, ranks = self.parts, self.accelerator.num_processes
        for i in range(n):
            rows = slice(len(batch.z_f) * i // n, len(batch.z_f) * (i + 1) // n)
            # the ranks' mean makes it a share of the global batch
            share = len(batch.z_f[rows]) * ranks / self.settings.batch_size
            with self.shards.without_sync() if i < n - 1 else nullcontext():
                yield MicroBatch(batch.rows(rows), share, i == n - 1)

    @property
    def micro_batch(self) -> int:
        """Return the number of samples of each set that are computed at once, at most."""
        return -(-self.settings.batch_size // (self.accelerator.num_processes * self.parts))

    def smaller(self) -> bool:
        """Halve the micro-batch; at one sample, compute activations twice instead of keeping them.

        Raises UserError where neither can be done any more, and on several processes: one of them alone would leave
        the others waiting for its gradients.
        """
        if self.accelerator.num_processes > 1:
            raise UserError(
                f"out of memory with {self.micro_batch} samples at a time, which several processes do not find by "
                "themselves: give a larger --gradient_accumulation_steps, or --gradient_checkpointing"
            )
        if self.parts < self.settings.batch_size:
            self.parts = min(2 * self.parts, self.settings.batch_size)
            tqdm.write(f"out of memory: {self.micro_batch} samples at a time from now on", file=sys.stderr)
            return True
        if not self.network.is_gradient_checkpointing:
            self.network.enable_gradient_checkpointing()
            tqdm.write("out of memory: gradient checkpointing from now on", file=sys.stderr)
            return True
        raise UserError(f"the {self.family.part} is too large to be trained here, one sample at a time: {LESS}")

    def _cond(self, rows: Tensor) -> Cond:
        """Return the conditioning of captions (n,), given by their rows in the table."""
        cond: Cond = {}
        for name, table in self.samples.embeddings.items():
            cond[name] = table[rows].to(self.accelerator.device)
        return cond

    def empty_cond(self, n: int) -> Cond:
        """Return the conditioning of n empty captions: the unconditional branch of guidance."""
        return self._cond(torch.full((n,), self.samples.empty))

    def concept_cond(self) -> Cond:
        """Return the conditioning of the concepts' own words: a row for each concept."""
        return self._cond(torch.tensor(self.samples.concepts))

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return x_t of latents (n, C, H, W) at timesteps (n,)."""
        return self.process.add_noise(x0, noise, t)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return what the network should return: noise, velocity, the clean latent or the flow."""
        return self.process.target(x0, noise, t)

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return the network's output in fp32; of no interest while the original model is asked beforehand: zeros."""
        if self.answers is not None and self.answers.open:
            return torch.zeros_like(x_t)
        return self._output(self.shards.forward, self.shards.dtype, x_t, t, cond)

    @torch.no_grad()
    def predict_original(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """Return the original model's output, fp32. Raises UserError where it was not kept."""
        if self.answers is not None:
            ask = partial(self._output, self.shards.forward, self.shards.dtype, x_t, t, cond)
            return self.answers(ask, x_t, t, cond)
        original = self.shards.original
        if original is None:
            raise UserError("this needs the network before any change: give --anchor_model original")
        with self.accelerator.autocast():  # as the student computes: equal weights give equal answers
            return self._output(original, self.shards.dtype, x_t, t, cond)

    def _output(self, call: Callable, dtype: torch.dtype, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        narrowed: Cond = {}
        for name, x in cond.items():
            narrowed[name] = x.to(dtype)
        return self.family.call(call, x_t.to(dtype), t, narrowed).float()

    def forget(self, batch: DenoisingBatch) -> Tensor:
        """Return L_f, the denoising loss of the concept's images under its captions."""
        return self._denoise(batch.z_f, batch.t_f, batch.noise_f, batch.c_f)

    def guided(self, batch: DenoisingBatch) -> Tensor:
        """Return MSE((1 + w) e(x_t, c_f) - w e(x_t, ""), target), w = 7.5; both answers are differentiated.

        The released codes of Scissorhands for classes and of SalUn take their saliency from it.
        """
        x_t = self.add_noise(batch.z_f, batch.noise_f, batch.t_f)
        concept = self.predict(x_t, batch.t_f, batch.c_f)
        empty = self.predict(x_t, batch.t_f, self.empty_cond(len(x_t)))
        answer = (1 + GUIDANCE) * concept - GUIDANCE * empty
        return nn.functional.mse_loss(answer, self.target(batch.z_f, batch.noise_f, batch.t_f))

    def contrast(self, batch: DenoisingBatch) -> Iterator[Tensor]:
        """Yield L_f, and less the loss of the same noisy images under the anchors."""
        yield self.forget(batch)
        yield -self._denoise(batch.z_f, batch.t_f, batch.noise_f, batch.c_a)

    def retain(self, batch: DenoisingBatch) -> Tensor:
        """Return L_r, the denoising loss on everything else."""
        return self._denoise(batch.z_r, batch.t_r, batch.noise_r, batch.c_r)

    def preserve(self, batch: DenoisingBatch) -> Tensor:
        """Return the MSE to the original model's output on everything else. Raises UserError without that model."""
        x_t = self.add_noise(batch.z_r, batch.noise_r, batch.t_r)
        predicted = self.predict(x_t, batch.t_r, batch.c_r)
        return nn.functional.mse_loss(predicted, self.predict_original(x_t, batch.t_r, batch.c_r))

    def redirect(self, batch: DenoisingBatch) -> Tensor:
        """Return the MSE between the output for the concept's caption and that for its anchor, which is a constant."""
        x_t = self.add_noise(batch.z_d, batch.noise_f, batch.t_d)
        predict = self.predict_original if self.settings.anchor_model == "original" else self.predict
        with torch.no_grad():
            wanted = predict(x_t, batch.t_d, batch.c_a)
        return nn.functional.mse_loss(self.predict(x_t, batch.t_d, batch.c_f), wanted)

    def _denoise(self, x0: Tensor, t: Tensor, noise: Tensor, cond: Cond) -> Tensor:
        predicted = self.predict(self.add_noise(x0, noise, t), t, cond)
        return nn.functional.mse_loss(predicted, self.target(x0, noise, t))

    def backward(self, loss: Tensor) -> None:
        """Add gradients in fp32, averaged over the ranks by accelerate, to those of earlier micro-batches."""
        self.accelerator.backward(loss)
        self.shards.after_backward()

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of a scalar over the ranks."""
        return self.accelerator.reduce(x, "mean")


def trimmed(model: nn.Module, scope: str, trained: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return what is re-initialised of a scope: no norms, and nothing that no training would repair."""
    found = {}
    for name, p in without_norms(model, select(model, scope)).items():
        if name in trained:
            found[name] = p
    return found


def frozen_copy(model: nn.Module, mixed_precision: str) -> nn.Module:
    """Return the original model where the model is, which answers with the same bits.

    Under bf16 autocast its linear and convolutional layers are stored as autocast would round them in every call.
    """
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    if mixed_precision == "bf16":
        for layer in frozen.modules():
            if isinstance(layer, ROUNDED):
                layer.to(torch.bfloat16)
    return frozen


CAPTIONS = ("c_f", "c_a", "c_r", "c_w")  # columns of a batch that are drawn as rows of the table of embeddings


class DenoisingBatch(NamedTuple):
    """This rank's slice: latents, timesteps, noise and captions' conditioning of n forget and n retain samples."""

    z_f: Tensor
    t_f: Tensor
    noise_f: Tensor
    c_f: Cond
    c_a: Cond
    z_r: Tensor
    t_r: Tensor
    noise_r: Tensor
    c_r: Cond
    z_d: Tensor  # what redirect is fitted on: z_f, or for half of the samples their anchors' latents
    t_d: Tensor  # and when: t_f, or the noisiest of several draws
    z_a: Tensor | None = None  # the anchors' latents, if they were sampled
    marks: Tensor | None = None  # (n, L) where the concept stands in c_f, see erase_sd.denoising.samples
    c_w: Cond | None = None  # the own words of the concept that c_f asks for

    def rows(self, chosen: slice) -> DenoisingBatch:
        """Return some of the samples."""
        return DenoisingBatch(*(_rows(column, chosen) for column in self))


def _rows(column: Tensor | Cond | None, chosen: slice) -> Tensor | Cond | None:
    if isinstance(column, dict):
        return {name: x[chosen] for name, x in column.items()}
    return None if column is None else column[chosen]


def draw(s: Samples, process: ForwardProcess, settings: TaskSettings, g: torch.Generator) -> dict[str, Tensor]:
    """Draw one forget and one retain sample with their timesteps and noise: columns of a batch, captions as rows."""
    f = int(torch.randint(len(s.forget), (), generator=g))
    r = int(torch.randint(len(s.retain), (), generator=g))
    t_f, t_r = process.draw(2, g)
    noise_f, noise_r = torch.randn(2, *s.forget.shape[1:], generator=g)
    dropped = torch.rand((), generator=g) < settings.drop_captions
    z_d = s.forget[f]
    if s.anchors is not None and torch.rand((), generator=g) < 0.5:
        z_d = s.anchors[f]
    t_d = torch.stack([t_f, *process.draw(settings.redirect_draws - 1, g)]).max()
    sample = {"z_f": s.forget[f], "t_f": t_f, "noise_f": noise_f, "c_f": s.caption[f], "c_a": s.anchor[f]}
    sample |= {"z_r": s.retain[r], "t_r": t_r, "noise_r": noise_r}
    sample |= {"c_r": torch.tensor(s.empty) if dropped else s.keep[r], "z_d": z_d, "t_d": t_d}
    sample["c_w"] = torch.tensor(s.concepts[0]) if s.words is None else s.words[f]
    if s.anchors is not None:
        sample["z_a"] = s.anchors[f]
    if s.marks is not None:
        sample["marks"] = s.marks[f]
    return sample
