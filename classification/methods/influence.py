"""Influence unlearning: one Newton-like step away from the forget set, with WoodFisher's inverse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from classification.task import ClassificationTask
from erase_sd.common.cli import knob
from erase_sd.core.projection import dot, subtract_
from erase_sd.core.task import Params, gradient
from erase_sd.methods.base import Method

CHUNK = 256  # examples whose summed gradient is computed at once


@dataclass(frozen=True, kw_only=True)
class Influence(Method):
    """IU, Izzo et al., AISTATS 2021, arXiv 2002.10077, with WoodFisher as Jia et al. 2023 use it (their recursion)."""

    alpha: float = knob(1.0, "step along F^-1 (G_f - G_r)")
    samples: int = knob(1000, "N: retain examples that F is estimated from")

    def __call__(self, task: ClassificationTask, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
        """Apply theta <- theta + alpha k in place; yield one record."""
        if state is not None:
            return
        task.model.eval()
        n_f, n_r = len(task.walks["forget"].images), len(task.walks["retain"].images)
        k = self.total(task, "forget", 1 / (n_f + n_r))
        subtract_(k, self.total(task, "retain", n_f / ((n_f + n_r) * n_r)), 1.0)
        n, o = self.samples, self.total(task, "retain", 1.0, range(1))
        for i in range(1, min(n + 2, n_r)):  # their loop ends after example N + 1
            g = self.total(task, "retain", 1.0, range(i, i + 1))
            s, kg = float(dot(o, g)), float(dot(k, g))
            subtract_(k, o, kg / (n + s))
            subtract_(o, o, s / (n + s))
        subtract_(task.trainable(), k, -self.alpha)
        yield {"step": 0, "loss": 0.0, "lr": self.alpha}, {"step": 1, "optimizer": {}}

    def total(self, task: ClassificationTask, name: str, scale: float, rows: range | None = None) -> Params:
        """Return `scale` times the summed gradients of examples of a set, without augmentation, in evaluation mode.

        `rows` are the examples, all of the set by default.
        """
        if rows is None:
            rows = range(len(task.walks[name].images))

        def loss(chunk: range) -> Tensor:
            x, y, _ = task.clean(name, torch.arange(chunk.start, chunk.stop))
            return scale * F.cross_entropy(task.logits(x), y, reduction="sum")

        total = gradient(task, loss, rows[:CHUNK], task.trainable())
        for start in range(CHUNK, len(rows), CHUNK):
            for key, g in gradient(task, loss, rows[start : start + CHUNK], task.trainable()).items():
                total[key] += g
        return total
