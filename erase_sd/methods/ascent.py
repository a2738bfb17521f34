"""Gradient ascent: make the forget data improbable, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from erase_sd.methods.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from erase_sd.core.task import Task


@dataclass(frozen=True, kw_only=True)
class GradientAscent(Objective):
    """GA, Thudi et al., EuroS&P 2022, arXiv 2109.13398: maximise L_f; only a tiny learning rate holds it back."""

    def objective(self, task: Task, batch: Any, step: int) -> Tensor:
        """-L_f."""
        return -task.forget(batch)
