"""Concept Ablation: answer the concept's caption as the anchor's is answered, on pictures of the anchor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from erase_sd.common.cli import knob
from erase_sd.methods.base import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from erase_sd.core.task import DiffusionTask


@dataclass(frozen=True, kw_only=True)
class ConceptAblation(Objective):
    """CA, Kumari et al., ICCV 2023, arXiv 2303.13516: fit e(x_t, c) to e(x_t, c*), x_t being the anchor's pictures.

    anchor_model says whose answer is wanted: the current network's, as published, or the original one's. train_scope
    makes the variant: kv, attn or full. The released code cuts the gradient at the first token and augments pictures;
    neither is done here.
    """

    needs_anchor_pictures: ClassVar[bool] = True

    target: Literal["model", "noise"] = knob("model", "fit the answer to the anchor's caption, or the noise itself")
    prior: float = knob(0.0, "weight of the denoising loss of the anchor's pictures under their own captions")

    def objective(self, task: DiffusionTask, batch: Any, step: int) -> Tensor:
        """MSE(e(x_t, c_f), sg e(x_t, c_a)), or L(z_a, c_f); and prior L(z_a, c_a)."""
        b = batch._replace(z_f=batch.z_a, z_d=batch.z_a)
        loss = task.redirect(b) if self.target == "model" else task.forget(b)
        return loss + self.prior * task.forget(b._replace(c_f=b.c_a)) if self.prior else loss
