"""Selective Amnesia: learn a surrogate under the concept's words, and hold what the other images depend on."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from erase_sd.common.cli import knob
from erase_sd.common.errors import UserError
from erase_sd.core.descent import Descent, descend, inner
from erase_sd.core.projection import subtract_
from erase_sd.core.sensitivity import accumulate
from erase_sd.core.task import DiffusionTask, Params
from erase_sd.methods.base import CONSTANT, GENTLE, POCKET, Method

T = 1000  # timesteps that the published Fisher information sums over

PRESETS = {
    # configs/forget_nudity.yaml: base rate 1e-5, times 4 GPUs, times batches of 4; 200 epochs of 1000 images
    # would be 12,500 steps a GPU. The Fisher information is measured another way: see the method.
    "authors-nudity": CONSTANT
    | {"anchor_pictures": True, "train_scope": "noxattn", "lr": 1.6e-4, "batch_size": 16, "steps": 12_500},
    "sd": GENTLE | {"anchor_pictures": True, "lr": 2e-5, "batch_size": 16, "steps": 500},
    "pocket": GENTLE | POCKET | {"anchor_pictures": True, "lam": 0.3, "fisher_batches": 20, "lr": 4e-4, "steps": 200},
}


@dataclass(frozen=True, kw_only=True)
class SelectiveAmnesia(Descent, Method):
    """SA, Heng & Soh, NeurIPS 2023, arXiv 2305.10120: L(q, c_f) + gamma L_r + lam sum_i F_i (theta_i - theta*_i)^2.

    q are the anchors' images under the concept's captions, theta* the weights before any change. The published
    F_i = 1/N sum_n (sum_t dL_nt/dtheta_i)^2 needs all T = 1000 timesteps of each image. Here F_i = T^2 B E[g_i^2],
    g being the gradient of a batch of B images at one sampled timestep each: T^2 turns the mean over t into the sum,
    B the mean over the batch back into single images. As E[g] is about 0 in a trained model, this is T^2 times the
    variance over images and timesteps; the published one averages over t before it squares and so is smaller: the
    same lam holds harder here.
    """

    needs_anchor_pictures: ClassVar[bool] = True

    gamma: float = knob(1.0, "weight of the replay loss L_r")
    lam: float = knob(50.0, "weight of the penalty, in units of the loss; the paper writes lam / 2")
    fisher_batches: int = knob(50, "batches over which the Fisher information is averaged")

    def __post_init__(self) -> None:
        """Raise UserError for a penalty without a batch to measure it on."""
        super().__post_init__()
        if self.lam and self.fisher_batches < 1:
            raise UserError("--fisher_batches 0 measures no Fisher information: give 1 or more, or --lam 0")

    def kept_bytes(self, width: int) -> int:
        """Return the bytes of an entry of the Fisher information and of theta*."""
        return 4 + 4

    def __call__(self, task: DiffusionTask, state: dict | None = None) -> Iterator[tuple[dict, dict | None]]:
        """Measure F, then descend; theta* and F travel in the state, since later weights do not tell them."""
        theta = task.trainable()
        measured = state["kept"] if state else (yield from self.fisher(task)) | star(theta)
        device = next(iter(theta.values())).device
        kept: Params = {}
        for name, x in measured.items():
            kept[name] = x.to(device)
        now = {"penalty": 0.0}

        def objective(batch: Any, step: int) -> Iterator[Tensor]:
            yield task.forget(batch._replace(z_f=batch.z_a))
            yield self.gamma * task.retain(batch)

        def edit(g: Params) -> None:
            if not self.lam:
                return
            d: Params = {}
            F_d: Params = {}
            for name, p in theta.items():
                d[name] = p.detach() - kept[f"star/{name}"]
                F_d[name] = kept[f"fisher/{name}"] * d[name]
            now["penalty"] = self.lam * inner(task, F_d, d)
            subtract_({name: g[name] for name in F_d}, F_d, -2 * self.lam)

        for record, after in descend(task, self, objective, state, edit=edit):
            yield record | now | {"loss": record["loss"] + now["penalty"]}, after | {"kept": kept}

    def fisher(self, task: DiffusionTask) -> Generator[tuple[dict, None], None, Params]:
        """Yield a record per batch; return T^2 B E[g^2] of the replay loss by "fisher/<parameter>"; {} if lam is 0."""
        F: Params = {}
        batches = range(self.fisher_batches if self.lam else 0)
        for mean in accumulate(task, task.retain, task.trainable(), "fisher", batches, torch.square):
            F = mean
            yield {"phase": "fisher"}, None
        scaled: Params = {}
        for name, x in F.items():
            scaled[f"fisher/{name}"] = x * T**2 * task.settings.batch_size
        return scaled


def star(theta: Params) -> Params:
    """Return copies of the weights theta*, by "star/<parameter>"."""
    copies: Params = {}
    for name, p in theta.items():
        copies[f"star/{name}"] = p.detach().clone()
    return copies
