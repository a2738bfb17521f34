"""Fine-tuning: train on what is to be kept, and hope that the rest is forgotten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from erase_sd.methods.base import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from erase_sd.core.task import Task


@dataclass(frozen=True, kw_only=True)
class FineTune(Objective):
    """FT, Warnecke et al., NDSS 2023, arXiv 2108.11577: minimise L_r; catastrophic forgetting does the rest."""

    asks_original: ClassVar[bool] = False

    def objective(self, task: Task, batch: Any, step: int) -> Tensor:
        """L_r."""
        return task.retain(batch)
