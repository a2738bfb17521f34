"""NegGrad+: gradient ascent held back by the retain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from erase_sd.common.cli import knob
from erase_sd.common.errors import UserError
from erase_sd.core.task import Task
from erase_sd.methods.base import Objective


@dataclass(frozen=True, kw_only=True)
class NegGradPlus(Objective):
    """NegGrad+, Kurmanji et al., NeurIPS 2023, arXiv 2302.09880: descend L_r and ascend L_f in the same step."""

    alpha: float = knob(0.95, "weight of L_r, that of -L_f being 1 - alpha; in [0, 1]")

    def __post_init__(self) -> None:
        """Raise UserError for an alpha outside [0, 1]."""
        super().__post_init__()
        if self.alpha > 1:
            raise UserError(f"--alpha {self.alpha} is above 1: it is the retain loss's share, give 0 to 1")

    def objective(self, task: Task, batch: Any, step: int) -> Tensor:
        """Return alpha L_r - (1 - alpha) L_f, a scalar."""
        return self.alpha * task.retain(batch) - (1 - self.alpha) * task.forget(batch)
