"""Nothing: the original model as it is, the row that every other one has to beat."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from classification.task import ClassificationTask
from erase_sd.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class Nothing(Method):
    """Nothing done: the original model is scored as if it had forgotten."""

    def __call__(self, task: ClassificationTask, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
        """Yield once, without a change."""
        if state is None:
            yield {"step": 0, "loss": 0.0, "lr": 0.0}, {"step": 1, "optimizer": {}}
