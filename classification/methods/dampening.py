"""Selective synaptic dampening: shrink what matters to the forget set far more than to all data; no training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from classification.task import ClassificationTask
from erase_sd.common.cli import knob
from erase_sd.core.sensitivity import accumulate
from erase_sd.core.task import Params
from erase_sd.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class Dampening(Method):
    """SSD, Foster et al., AAAI 2024, arXiv 2308.07707: theta <- min(lam I_D / I_f, 1) theta where I_f > alpha I_D."""

    alpha: float = knob(10.0, "how many times more important to D_f than to all data a weight must be")
    lam: float = knob(1.0, "share of a selected weight that stays, in units of I_D / I_f")

    def __call__(self, task: ClassificationTask, state: dict | None = None) -> Iterator[tuple[dict, dict]]:
        """Dampen the weights in place; yield one record, which counts them."""
        if state is not None:
            return
        task.model.eval()
        n_f, n_r = len(task.walks["forget"].images), len(task.walks["retain"].images)
        importance_f = self.importance(task, "forget")
        importance_r = self.importance(task, "retain")
        selected = 0
        for name, p in task.trainable().items():
            everywhere = (n_f * importance_f[name] + n_r * importance_r[name]) / (n_f + n_r)
            chosen = importance_f[name] > self.alpha * everywhere
            share = (self.lam * everywhere / importance_f[name]).clamp(max=1)
            p.data.copy_(torch.where(chosen, p * share, p))  # in place: whoever saves the weights holds p
            selected += int(chosen.sum())
        yield {"step": 0, "loss": 0.0, "lr": 0.0, "selected": selected}, {"step": 1, "optimizer": {}}

    def importance(self, task: ClassificationTask, name: str) -> Params:
        """Return the mean of the squared batch gradients over one epoch of the forget or the retain set."""
        loss = task.forget if name == "forget" else task.retain
        *_, mean = accumulate(task, loss, task.trainable(), "importance", range(task.epoch(name)), torch.square)
        return mean
