"""What a network knows of a data set's parts: accuracies, and membership inference."""

from __future__ import annotations

import torch
from torch import nn

from classification.data.partition import Parts
from classification.metrics.accuracy import accuracy, logits
from classification.metrics.mia import Answers, svc_attack

SHADOW_CAP = 5000  # examples of each kind that the SVC attack learns from; its cost is quadratic


def scores(model: nn.Module, cut: Parts, device: torch.device) -> dict[str, float]:
    """Accuracies in [0, 1] on D_f, D_r, D_t and validation, and the share of D_f that the SVC attack calls unseen.

    `mia_val` is the same attack with validation examples for non-members: what a search may look at.
    """
    sets = {"acc_f": cut.forget, "acc_r": cut.retain, "acc_t": cut.test, "acc_val": cut.val}
    answers = {name: Answers(logits(model, part, device=device), part.labels) for name, part in sets.items()}
    attack = lambda others: svc_attack(  # noqa: E731
        answers["acc_r"], answers[others], answers["acc_f"], cap=SHADOW_CAP
    )["confidence"]
    rates = {name: accuracy(x.logits, x.labels) for name, x in answers.items()}
    return rates | {"mia": attack("acc_t"), "mia_val": attack("acc_val")}
