"""SCRUB: a student that disobeys its teacher on the forget set and follows it on the retain set."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from classification.task import ClassificationTask, ClassifierBatch
from erase_sd.common.cli import knob
from erase_sd.methods.base import Objective


@dataclass(frozen=True, kw_only=True)
class Scrub(Objective):
    """SCRUB, Kurmanji et al., NeurIPS 2023, arXiv 2302.09880: max steps on D_f and min steps on D_r, by turns."""

    max_epochs: int = knob(2, "epochs that begin with a walk through D_f that raises KL to the teacher")
    alpha: float = knob(0.5, "weight of KL to the teacher on D_r")
    gamma: float = knob(1.0, "weight of L_r")
    temperature: float = knob(4.0, "of both networks' answers, > 0")

    def objective(self, task: ClassificationTask, batch: ClassifierBatch, step: int) -> Tensor:
        """Return -KL_T on D_f in a max step, gamma L_r + alpha KL_T on D_r in a min step; a scalar."""
        if self.is_max(step, task.epoch("forget"), task.epoch("retain")):
            return -self.distance(task, batch.forget.x)
        return self.gamma * task.retain(batch) + self.alpha * self.distance(task, batch.retain.x)

    def is_max(self, step: int, forget: int, retain: int) -> bool:
        """Return whether the step is one of the `forget` first of the `forget + retain` steps of an early epoch."""
        epoch, position = divmod(step, forget + retain)
        return epoch < self.max_epochs and position < forget

    def distance(self, task: ClassificationTask, x: Tensor) -> Tensor:
        """Return T^2 KL(teacher || student) at temperature T on images x (n, C, H, W), the mean over the samples."""
        with torch.no_grad():
            teacher = (task.original()(x) / self.temperature).log_softmax(1)
        student = (task.logits(x) / self.temperature).log_softmax(1)
        return self.temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")
