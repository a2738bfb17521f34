"""What methods that are a single loss share: they differ in `objective` alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from erase_sd.core.descent import Descent

if TYPE_CHECKING:
    from torch import Tensor

    from erase_sd.core.task import Task


@dataclass(frozen=True, kw_only=True)
class Objective(Descent):
    """Minimise one objective over the trainable weights."""

    def objective(self, task: Task, batch: Any, step: int) -> Tensor:
        """The loss of a batch at a step, a scalar."""
        raise NotImplementedError

    def __call__(self, task: Task, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
        """Descend, in place; yields (record, state) after each step."""
        from erase_sd.core.descent import descend

        return descend(task, self, partial(self.objective, task), state)
