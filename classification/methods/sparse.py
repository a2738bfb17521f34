"""l1-sparse: fine-tuning that presses weights towards zero first, since sparse networks forget more."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from classification.task import ClassificationTask, ClassifierBatch
from erase_sd.common.cli import knob
from erase_sd.methods.base import Objective


@dataclass(frozen=True, kw_only=True)
class L1Sparse(Objective):
    """l1-sparse, Jia et al., NeurIPS 2023, arXiv 2304.04934: minimise L_r + gamma |theta|_1, gamma falling to 0.

    It falls linearly from epoch to epoch through the retain set, as in the released code.
    """

    l1: float = knob(1e-4, "gamma in the first epoch, in units of L_r per unit of |theta|_1")

    def objective(self, task: ClassificationTask, batch: ClassifierBatch, step: int) -> Tensor:
        """Return L_r + gamma |theta|_1, a scalar, over all that is trained, biases and norms included."""
        epoch = task.epoch("retain")
        gamma = self.l1 * (1 - (step // epoch) / math.ceil(self.steps / epoch))
        size = sum(p.abs().sum() for p in task.trainable().values())
        others = task.shards.all_reduce(size.detach()) - size.detach()  # each shard knows its own gradient
        return task.retain(batch) + gamma * (size + others)
