"""Boundary shrink: every forget example joins the class across its nearest boundary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from classification.task import ClassificationTask, ClassifierBatch
from erase_sd.common.cli import knob
from erase_sd.methods.base import Objective


@dataclass(frozen=True, kw_only=True)
class BoundaryShrink(Objective):
    """BS, Chen et al., CVPR 2023, arXiv 2303.11570: find each example's neighbour class by FGSM and teach it that."""

    epsilon: float = knob(0.1, "size of the attack, in pixel values from 0 to 1")
    other_only: bool = knob(True, "never the true class, where the attack fails (released code: then it is retrained)")

    def objective(self, task: ClassificationTask, batch: ClassifierBatch, step: int) -> Tensor:
        """Return l(f(x_f), y'), y' being the original model's class of x_f + epsilon sign grad_x l; a scalar."""
        original = task.original()
        x, y, _ = batch.forget
        with torch.enable_grad():
            attacked = x.detach().clone().requires_grad_()
            (slope,) = torch.autograd.grad(F.cross_entropy(original(attacked), y), attacked)
        with torch.no_grad():
            attacked = (x + self.epsilon * slope.sign()).clamp(0, 1)
            logits = original((attacked * 255).round() / 255)  # rounded to grey levels, as an image file would be
            if self.other_only:
                logits = logits.scatter(1, y[:, None], -torch.inf)
        return F.cross_entropy(task.logits(x), logits.argmax(1))
