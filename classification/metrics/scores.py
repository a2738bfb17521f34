"""All that is measured on a network after a run: accuracies, and membership inference."""

from __future__ import annotations

import torch
from torch import nn

from classification.data.partition import Parts
from classification.metrics.accuracy import accuracy, logits
from classification.metrics.mia import Outputs, svc_attack
from classification.settings import Scoring


def scores(model: nn.Module, parts: Parts, device: torch.device, scoring: Scoring) -> dict[str, float]:
    """Return accuracies in [0, 1] on D_f, D_r, D_t and validation, and the share of D_f that is taken for unseen.

    `mia` is that share by the SVC attack with test examples for non-members, `mia_val` with validation examples: what
    a search may look at. Features besides the confidence that are asked for come as `mia_entropy` and so on.
    """
    sets = {"acc_f": parts.forget, "acc_r": parts.retain, "acc_t": parts.test, "acc_val": parts.val}
    outputs = {}
    found = {}
    for name, images in sets.items():
        outputs[name] = Outputs(logits(model, images, device=device), images.labels)
        found[name] = accuracy(outputs[name].logits, images.labels)
    for name, others in (("mia", "acc_t"), ("mia_val", "acc_val")):
        attack = svc_attack(
            outputs["acc_r"],
            outputs[others],
            outputs["acc_f"],
            features=tuple(dict.fromkeys(("confidence", *scoring.mia_features))),
            shadow=scoring.mia_shadow,
            cap=scoring.mia_cap,
        )
        for feature, share in attack.items():
            found[name if feature == "confidence" else f"{name}_{feature}"] = share
    return found
