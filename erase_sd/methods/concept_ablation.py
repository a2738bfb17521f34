"""Concept Ablation: predict for the concept's caption what is predicted for its anchor's, on images of the anchor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from erase_sd.common.cli import knob
from erase_sd.core.task import DiffusionTask
from erase_sd.methods.base import GENTLE, POCKET, Objective

CA = GENTLE | {"schedule": "constant", "weight_decay": 0.01, "max_grad_norm": 1.0, "anchor_pictures": True}
PRESETS = {
    # diffusers/train.py: base rate 2e-6, times 2 GPUs, times batches of 4; nudity: attn, 4e-6, 400 steps, prior.
    "authors": CA | {"train_scope": "kv", "lr": 1.6e-5, "batch_size": 8, "steps": 100},
    "authors-nudity": CA | {"train_scope": "attn", "prior": 1.0, "lr": 6.4e-5, "batch_size": 8, "steps": 400},
    "sd": CA | {"train_scope": "kv", "lr": 1.6e-5, "batch_size": 8, "steps": 100},
    "pocket": CA | POCKET | {"train_scope": "kv", "lr": 1e-4, "steps": 200},
}


@dataclass(frozen=True, kw_only=True)
class ConceptAblation(Objective):
    """CA, Kumari et al., ICCV 2023, arXiv 2303.13516: fit e(x_t, c) to e(x_t, c*), x_t being images of the anchor.

    anchor_model says whose prediction is wanted: the current network's, as published, or the original model's.
    train_scope makes the variant: kv, attn or full. The released code cuts the gradient at the first token and
    augments images; neither is done here.
    """

    needs_anchor_pictures: ClassVar[bool] = True

    target: Literal["model", "noise"] = knob("model", "fit the answer to the anchor's caption, or the noise itself")
    prior: float = knob(0.0, "weight of the denoising loss of the anchor's images under their own captions")

    def objective(self, task: DiffusionTask, batch: Any, step: int) -> Iterator[Tensor]:
        """Yield MSE(e(x_t, c_f), sg e(x_t, c_a)), or L(z_a, c_f); and prior L(z_a, c_a)."""
        on_anchors = batch._replace(z_f=batch.z_a, z_d=batch.z_a)
        yield task.redirect(on_anchors) if self.target == "model" else task.forget(on_anchors)
        if self.prior:
            yield self.prior * task.forget(on_anchors._replace(c_f=batch.c_a))
