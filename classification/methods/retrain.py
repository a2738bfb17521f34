"""Retraining from scratch on the retain set: what every other method is measured against."""

from __future__ import annotations

from dataclasses import dataclass

from erase_sd.methods.finetune import FineTune


@dataclass(frozen=True, kw_only=True)
class Retrain(FineTune):
    """Retrain: the model that never saw the forget set. `run.jobs.unlearn` gives it a network with fresh weights."""
