"""Boundary shrink: every forget example joins the class across its nearest boundary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from erase_sd.common.cli import knob
from erase_sd.methods.base import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from classification.task import ClassificationTask, ClassifierBatch


@dataclass(frozen=True, kw_only=True)
class BoundaryShrink(Objective):
    """BS, Chen et al., CVPR 2023, arXiv 2303.11570: find each example's neighbour class by FGSM and teach it that."""

    epsilon: float = knob(0.1, "size of the attack, in pixel values from 0 to 1")
    other_only: bool = knob(True, "never the true class, where the attack fails (released code: then it is retrained)")

    def objective(self, task: ClassificationTask, batch: ClassifierBatch, step: int) -> Tensor:
        """l(f(x_f), y'), y' being the original network's answer to x_f + epsilon sign grad_x l."""
        import torch
        import torch.nn.functional as F

        network, (x, y, _) = task.original(), batch.forget
        with torch.enable_grad():
            attacked = x.detach().clone().requires_grad_()
            (slope,) = torch.autograd.grad(F.cross_entropy(network(attacked), y), attacked)
        with torch.no_grad():  # rounded to grey levels, as a picture would be
            answers = network(((x + self.epsilon * slope.sign()).clamp(0, 1) * 255).round() / 255)
            if self.other_only:
                answers = answers.scatter(1, y[:, None], -torch.inf)
        return F.cross_entropy(task.logits(x), answers.argmax(1))
