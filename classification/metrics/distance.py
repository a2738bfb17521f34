"""How far a model's outputs are from Retrain's: an unlearned model should predict like one that never saw D_f."""

import math
from typing import NamedTuple

from torch import Tensor


class Distance(NamedTuple):
    """Means over the examples; divergences in nats."""

    js: float  # Jensen-Shannon divergence, at most log 2
    kl: float  # KL(Retrain || model)
    disagreement: float  # share in [0, 1] of examples whose most probable class differs


def distance(logits: Tensor, retrain: Tensor) -> Distance:
    """Return the distance between two models' logits (N, K) on the same examples; ValueError where shapes differ."""
    if logits.shape != retrain.shape or not len(logits):
        raise ValueError(f"logits of the same examples and classes are needed, not {logits.shape} and {retrain.shape}")
    log_q = logits.double().log_softmax(1)
    log_p = retrain.double().log_softmax(1)
    log_m = log_p.logaddexp(log_q) - math.log(2)
    js = ((_kl(log_p, log_m) + _kl(log_q, log_m)) / 2).clamp(min=0)  # rounding may leave -1e-17
    differ = (logits.argmax(1) != retrain.argmax(1)).double().mean()
    return Distance(js.item(), _kl(log_p, log_q).item(), differ.item())


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q), the mean over the examples, of log probabilities (N, K)."""
    return (log_p.exp() * (log_p - log_q)).sum(1).mean()
