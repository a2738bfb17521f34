"""Gradient ascent: make the forget data improbable, held back by the retain data if asked to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from erase_sd.common.cli import knob
from erase_sd.methods.base import Objective

if TYPE_CHECKING:
    from torch import Tensor

    from erase_sd.core.task import Task


@dataclass(frozen=True, kw_only=True)
class GradientAscent(Objective):
    """GA, Thudi et al., EuroS&P 2022, arXiv 2109.13398: maximise L_f; SalUn's code for diffusion adds alpha L_r."""

    alpha: float = knob(0.0, "weight of the retain loss L_r beside -L_f; 0 asks for no retain data")
    forget_ceiling: float | None = knob(None, "L_f above which a step only retains: L_f has no upper bound")

    asks_original: ClassVar[bool] = False

    def __call__(self, task: Task, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
        """Descend -L_f + alpha L_r, the first term resting where the whole batch's L_f is above the ceiling."""
        from erase_sd.core.descent import descend, measure

        weight, ceiling = {}, self.forget_ceiling

        def before(batch: Any, step: int) -> None:
            over = ceiling is not None and measure(task, task.forget, batch, "forget") > ceiling
            weight["forget"] = 0.0 if over else 1.0

        def objective(batch: Any, step: int) -> Tensor:
            L_f = weight["forget"] * task.forget(batch)
            return self.alpha * task.retain(batch) - L_f if self.alpha else -L_f

        return descend(task, self, objective, state, before=before)
