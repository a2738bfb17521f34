"""Erasing from a diffusion model as a Task: one denoising loss for every family of models, five ways to use it.

    L(z, c) = MSE(e_theta(x_t, t, c), target)        x_t and the target: erase_sd.models.noise

    forget    L(z_f, c_f)                                   Scissorhands' L_f
    retain    L(z_r, c_r)                                   Scissorhands' L_r
    preserve  MSE(e_theta(x_t, t, c_r), e_0(x_t, t, c_r))   the retain captions answered as before
    redirect  MSE(e_theta(x_t, t, c_f), e_0(x_t, t, c_a))   the concept's caption answered like its anchor's; at t_d
    contrast  L(z_f, c_f) - L(z_f, c_a)                     what only the concept's words explain

z_f, z_r are latents, c_f, c_r their captions, c_a the anchor; e_0 is the network before any change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from erase_sd.common.errors import UserError
from erase_sd.common.rng import generator
from erase_sd.core.task import MicroBatch, Replicated
from erase_sd.denoising.samples import Samples
from erase_sd.models.families import Cond, family, network
from erase_sd.models.noise import ForwardProcess, forward_process
from erase_sd.models.parameters import select, without_norms
from erase_sd.settings import TaskSettings

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# What accelerate sets on a model to autocast it; with the last one left, it would not prepare the model again.
WRAPPED = ("forward", "_original_forward", "_is_accelerate_prepared")


class DenoisingTask(Replicated):
    """See `erase_sd.core.task`. Every draw is keyed by (seed, purpose, step, global sample index)."""

    def __init__(
        self, pipe: DiffusionPipeline, samples: Samples, knobs: TaskSettings, seed: int, accelerator: Accelerator
    ) -> None:
        self.samples, self.knobs, self.seed, self.accelerator = samples, knobs, seed, accelerator
        each = accelerator.num_processes * knobs.gradient_accumulation_steps
        if knobs.batch_size < each:
            raise UserError(f"--batch_size {knobs.batch_size} leaves micro-batches empty: give {each} or more")
        self.family, self.process = family(pipe), forward_process(pipe)
        self.model: nn.Module = network(pipe).requires_grad_(False)
        self._trainable = select(self.model, knobs.train_scope)
        self._trimmable = without_norms(self.model, select(self.model, knobs.trim_scope))
        self._ranked = select(self.model, knobs.rank_scope) if knobs.rank_scope else self._trimmable
        self.original: nn.Module | None = None
        for p in (self._trainable | self._trimmable | self._ranked).values():
            p.requires_grad_(True)
        self._prepare()

    def _prepare(self) -> None:
        """Everything on its device, the original network beside it if a loss asks for it, gradients meant to meet."""
        self.model.to(self.accelerator.device)
        if self.knobs.anchor_model == "original":
            self.original = self._frozen_copy()
        self._unwrapped = {name: self.model.__dict__[name] for name in WRAPPED if name in self.model.__dict__}
        self.forward = self.accelerator.prepare_model(self.model)

    def _frozen_copy(self) -> nn.Module:
        """The network before any change; half precision where the device computes in it."""
        frozen = copy.deepcopy(self.model).eval().requires_grad_(False)
        return frozen.to(torch.bfloat16) if self.accelerator.device.type == "cuda" else frozen

    def assemble(self) -> None:
        """Bring the result into the pipe's own network: it is there."""

    def release(self) -> None:
        """Undo what preparing the model did to it: no autocast in its forward, no gradients."""
        for name in WRAPPED:
            self.model.__dict__.pop(name, None)
        self.model.__dict__.update(self._unwrapped)
        self.model.requires_grad_(False).zero_grad(set_to_none=True)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that the repair moves, in the model's order."""
        return self._trainable

    def trimmable(self) -> dict[str, nn.Parameter]:
        """Parameters that may be re-initialised, norms excluded, in the model's order."""
        return self._trimmable

    def ranked(self) -> dict[str, nn.Parameter]:
        """Parameters among which the most sensitive are looked for, in the model's order."""
        return self._ranked

    def batch(self, purpose: str, step: int) -> DenoisingBatch:
        """The global batch of this step, sliced to this rank."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        rows = range(rank, self.knobs.batch_size, ranks)
        g = (generator(self.seed, purpose, step, i) for i in rows)
        draws = [draw(self.samples, self.process, self.knobs, each) for each in g]
        columns = {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}
        conds = {name: self._conditioning(columns.pop(name)) for name in ("c_f", "c_a", "c_r")}
        return DenoisingBatch(**conds, **{name: x.to(self.accelerator.device) for name, x in columns.items()})

    def micro_batches(self, batch: DenoisingBatch) -> Iterator[MicroBatch]:
        """Micro-batches of this rank's slice; DDP averages the gradients over the ranks at the last one only."""
        n, ranks = self.knobs.gradient_accumulation_steps, self.accelerator.num_processes
        for i in range(n):
            rows = slice(len(batch.z_f) * i // n, len(batch.z_f) * (i + 1) // n)
            share = len(batch.z_f[rows]) * ranks / self.knobs.batch_size  # the ranks' mean makes it a share of all
            with self._alone() if i < n - 1 else nullcontext():
                yield MicroBatch(batch.rows(rows), share, i == n - 1)

    def _alone(self) -> AbstractContextManager:
        return self.accelerator.no_sync(self.forward)  # in it no rank waits for the others' gradients

    def _conditioning(self, rows: Tensor) -> Cond:
        """The conditioning of captions, by their rows in the table."""
        return {name: table[rows].to(self.accelerator.device) for name, table in self.samples.embeddings.items()}

    def empty_cond(self, n: int) -> Cond:
        """The conditioning of n empty captions: the unconditional branch of guidance."""
        return self._conditioning(torch.full((n,), self.samples.empty))

    def concept_cond(self, n: int) -> Cond:
        """The conditioning of the concept's own words, n times."""
        return self._conditioning(torch.full((n,), self.samples.concept))

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t for latents (n, C, H, W) at timesteps (n,)."""
        return self.process.add_noise(x0, noise, t)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should return: noise, velocity, the clean latent or the flow."""
        return self.process.target(x0, noise, t)

    def predict(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The network's output in fp32."""
        return self._answer(self.forward, self.model.dtype, x_t, t, cond)

    @torch.no_grad()
    def predict_original(self, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """What the network before any change returns, fp32. Raises UserError where it was not kept."""
        if self.original is None:
            raise UserError("this needs the network before any change: give --anchor_model original")
        return self._answer(self.original, self.original.dtype, x_t, t, cond)

    def _answer(self, call: Callable, dtype: torch.dtype, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        cond = {name: x.to(dtype) for name, x in cond.items()}
        return self.family.call(call, x_t.to(dtype), t, cond).float()

    def forget(self, batch: DenoisingBatch) -> Tensor:
        """L_f, the denoising loss of the concept's pictures under its captions."""
        return self._denoise(batch.z_f, batch.t_f, batch.noise_f, batch.c_f)

    def contrast(self, batch: DenoisingBatch) -> Tensor:
        """L_f less the loss of the same noisy pictures under the anchors."""
        return self.forget(batch) - self._denoise(batch.z_f, batch.t_f, batch.noise_f, batch.c_a)

    def retain(self, batch: DenoisingBatch) -> Tensor:
        """L_r, the denoising loss on everything else."""
        return self._denoise(batch.z_r, batch.t_r, batch.noise_r, batch.c_r)

    def preserve(self, batch: DenoisingBatch) -> Tensor:
        """Distance from what the original network returns on everything else. Raises UserError without it."""
        x_t = self.add_noise(batch.z_r, batch.noise_r, batch.t_r)
        return nn.functional.mse_loss(
            self.predict(x_t, batch.t_r, batch.c_r), self.predict_original(x_t, batch.t_r, batch.c_r)
        )

    def redirect(self, batch: DenoisingBatch) -> Tensor:
        """Distance between the answer to the concept's caption and the answer to its anchor."""
        x_t = self.add_noise(batch.z_d, batch.noise_f, batch.t_d)
        answer = self.predict_original if self.knobs.anchor_model == "original" else self.predict
        with torch.no_grad():
            wanted = answer(x_t, batch.t_d, batch.c_a)
        return nn.functional.mse_loss(self.predict(x_t, batch.t_d, batch.c_f), wanted)

    def _denoise(self, x0: Tensor, t: Tensor, noise: Tensor, cond: Cond) -> Tensor:
        predicted = self.predict(self.add_noise(x0, noise, t), t, cond)
        return nn.functional.mse_loss(predicted, self.target(x0, noise, t))

    def backward(self, loss: Tensor) -> None:
        """Gradients in fp32, averaged over the ranks by accelerate's wrapper, added to those of earlier parts."""
        scale = 1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale()
        self._scale(scale)
        self._differentiate(loss)
        self._scale(1 / scale)

    def _differentiate(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def _scale(self, by: float) -> None:
        """Gradients, where a scaler of fp16 is at work."""
        for p in self.model.parameters() if by != 1 else ():
            if p.grad is not None:
                p.grad *= by

    def mean(self, x: Tensor) -> Tensor:
        """Mean of a scalar over the ranks."""
        return self.accelerator.reduce(x, "mean")


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
    z_d: Tensor  # what redirect is fitted on: z_f, or for half of the samples their anchors' pictures
    t_d: Tensor  # and when: t_f, or the noisiest of several draws
    z_a: Tensor | None = None  # the anchors' pictures, if they were drawn
    marks: Tensor | None = None  # (n, L) where the concept stands in c_f, see erase_sd.denoising.samples

    def rows(self, chosen: slice) -> DenoisingBatch:
        """Some of the samples."""
        return DenoisingBatch(*(_rows(column, chosen) for column in self))


def _rows(column: Tensor | Cond | None, chosen: slice) -> Tensor | Cond | None:
    if isinstance(column, dict):
        return {name: x[chosen] for name, x in column.items()}
    return None if column is None else column[chosen]


def draw(s: Samples, forward_process: ForwardProcess, knobs: TaskSettings, g: torch.Generator) -> dict[str, Tensor]:
    """One forget and one retain sample with their timesteps, noise and rows of the captions."""
    f, r = (int(torch.randint(n, (), generator=g)) for n in (len(s.forget), len(s.retain)))
    t_f, t_r = forward_process.draw(2, g)
    noise_f, noise_r = torch.randn(2, *s.forget.shape[1:], generator=g)
    dropped = torch.rand((), generator=g) < knobs.drop_captions
    swap = s.anchors is not None and torch.rand((), generator=g) < 0.5
    forget = {"z_f": s.forget[f], "t_f": t_f, "noise_f": noise_f, "c_f": s.caption[f], "c_a": s.anchor[f]}
    retain = {"z_r": s.retain[r], "t_r": t_r, "noise_r": noise_r}
    retain["c_r"] = torch.tensor(s.empty) if dropped else s.keep[r]
    more = {name: x[f] for name, x in (("z_a", s.anchors), ("marks", s.marks)) if x is not None}
    t_d = torch.stack([t_f, *forward_process.draw(knobs.redirect_draws - 1, g)]).max()
    return forget | retain | more | {"z_d": s.anchors[f] if swap else s.forget[f], "t_d": t_d}
