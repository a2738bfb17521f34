"""Gradient ascent: make the forget set improbable, held back by the retain set if asked to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from erase_sd.common.cli import knob
from erase_sd.core.descent import descend, measure
from erase_sd.core.task import Task
from erase_sd.methods.base import GENTLE, POCKET, Objective

PRESETS = {
    # SalUn's SD/train-scripts/gradient_ascent.py: -L_f + 0.1 L_r, ten epochs, without a ceiling.
    "authors-cls": GENTLE
    | {"schedule": "constant", "alpha": 0.1, "lr": 1e-5, "batch_size": 8, "steps": 1000, "drop_captions": 0.0},
    # Noise has variance 1, so that a model which predicts nothing has L_f = 1.
    "sd": GENTLE | {"alpha": 1.0, "forget_ceiling": 1.0, "lr": 1e-5, "batch_size": 16, "steps": 60},
    "pocket": GENTLE | POCKET | {"alpha": 3.0, "forget_ceiling": 1.0, "lr": 5e-5, "steps": 100},
}


@dataclass(frozen=True, kw_only=True)
class GradientAscent(Objective):
    """GA, Thudi et al., EuroS&P 2022, arXiv 2109.13398: maximise L_f; SalUn's code for diffusion adds alpha L_r."""

    alpha: float = knob(0.0, "weight of the retain loss L_r beside -L_f; 0 asks for no retain data")
    forget_ceiling: float | None = knob(None, "L_f above which a step only retains: L_f has no upper bound")

    asks_original: ClassVar[bool] = False

    def __call__(self, task: Task, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
        """Descend -L_f + alpha L_r, the first term resting where the whole batch's L_f is above the ceiling."""
        weight = {"forget": 1.0}

        def before(batch: Any, step: int) -> None:
            weight["forget"] = 0.0 if self.rests(task, batch) else 1.0

        def objective(batch: Any, step: int) -> Iterator[Tensor]:
            if self.alpha:
                yield self.alpha * task.retain(batch)
            yield -weight["forget"] * task.forget(batch)

        return descend(task, self, objective, state, before=before)

    def rests(self, task: Task, batch: Any) -> bool:
        """Return whether L_f of the whole batch is above the ceiling."""
        if self.forget_ceiling is None:
            return False
        return measure(task, task.forget, batch, "forget") > self.forget_ceiling
