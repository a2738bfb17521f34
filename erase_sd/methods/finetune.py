"""Fine-tuning: train on what is to be kept, and hope that the rest is forgotten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from erase_sd.core.task import Task
from erase_sd.methods.base import GENTLE, POCKET, Objective

PRESETS = {
    "sd": GENTLE | {"lr": 1e-5, "batch_size": 16, "steps": 125},
    "pocket": GENTLE | POCKET | {"lr": 1e-4, "steps": 150},
}


@dataclass(frozen=True, kw_only=True)
class FineTune(Objective):
    """FT, Warnecke et al., NDSS 2023, arXiv 2108.11577: minimise L_r; catastrophic forgetting does the rest."""

    asks_original: ClassVar[bool] = False

    def objective(self, task: Task, batch: Any, step: int) -> Tensor:
        """Return L_r."""
        return task.retain(batch)
