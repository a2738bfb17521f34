"""BadT: distil from a network that knows nothing where the data are to be forgotten, from the original elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from classification.task import ClassificationTask, ClassifierBatch
from erase_sd.common.cli import knob
from erase_sd.common.errors import UserError
from erase_sd.common.rng import keyed_rng
from erase_sd.core.descent import Descent, descend
from erase_sd.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class BadTeacher(Descent, Method):
    """BadT, Chundawat et al., AAAI 2023, arXiv 2205.08096: answer as an untrained network on D_f, as before on D_r.

    Both sets are mixed in one shuffled walk. The loss is the mean over the samples; the released one divides by the
    number of classes too, which Adam does not see.
    """

    retain_share: float = knob(0.3, "share of D_r that is walked through beside D_f, in (0, 1]")
    temperature: float = knob(1.0, "of all answers, > 0")

    def __post_init__(self) -> None:
        """Raise UserError for a share outside (0, 1]."""
        super().__post_init__()
        if not 0 < self.retain_share <= 1:
            raise UserError(f"--retain_share {self.retain_share} is outside (0, 1]: it is a share of the retain set")

    def __call__(self, task: ClassificationTask, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
        """Descend KL(teacher || f), in place; yield (record, state) after each step."""
        task.join(self.retain_share)
        per_epoch = task.epoch("joint", self.retain_share)
        knows, knows_nothing = task.original(), untrained(task.original(), task.seed)

        def objective(batch: ClassifierBatch, step: int) -> Tensor:
            x, y, other = task.pass_batch("repair", *divmod(step, per_epoch)).joint
            with torch.no_grad():
                wanted = torch.where((other != y)[:, None], knows_nothing(x), knows(x))  # of D_f it is another label
            teacher = (wanted / self.temperature).log_softmax(1)
            student = (task.logits(x) / self.temperature).log_softmax(1)
            return F.kl_div(student, teacher, log_target=True, reduction="batchmean")

        yield from descend(task, self, objective, state)


def untrained(model: nn.Module, seed: int) -> nn.Module:
    """Return a copy of a model with fresh weights in every layer that can draw them, in evaluation mode."""
    fresh = copy.deepcopy(model)
    with keyed_rng(seed, "untrained"):
        for layer in fresh.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
    return fresh.eval().requires_grad_(False)
