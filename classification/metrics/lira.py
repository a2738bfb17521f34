"""U-LiRA: is an example's confidence more like that of models that unlearned it, or of models that never saw it?

Hayes et al., "Inexact Unlearning Needs More Careful Evaluations to Avoid a False Sense of Privacy", arXiv 2403.01218;
the likelihood ratio is that of Carlini et al., arXiv 2112.03570. Exact unlearning leaves an accuracy and AUC of 0.5.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

FLOOR = 1e-6  # of a standard deviation of confidences, where shadow models agree to the last digit


class Attack(NamedTuple):
    """How well "unlearned" is told from "never seen"."""

    accuracy: float  # of the more likely of the two
    auc: float
    tpr: float  # share of the unlearned that is found ...
    fpr: float  # ... while at most this share of the never seen is accused


def confidence(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log p_y - log(1 - p_y), (N,) float64, of logits (N, K) and labels (N,): close to Gaussian over models.

    From the logits themselves, so that no probability is rounded to 1.
    """
    z = logits.double()
    others = z.scatter(1, labels[:, None], -math.inf)
    return z.gather(1, labels[:, None])[:, 0] - others.logsumexp(1)


def log_ratio(target: Tensor, unlearned: Tensor, never: Tensor, *, pooled: bool = False) -> Tensor:
    """Return log N(target | unlearned) - log N(target | never) per example, shaped like `target`, (N,) or (T, N).

    `unlearned` and `never` (S, N), S >= 2, are the confidences of shadow models that were trained on the examples and
    then unlearned them, and of models that were not trained on them. `pooled` shares one variance among all examples:
    steadier with few shadow models.
    """
    return _log_density(target, unlearned, pooled) - _log_density(target, never, pooled)


def _log_density(x: Tensor, shadow: Tensor, pooled: bool) -> Tensor:
    """Return the log density at x of each example's Gaussian, fitted to `shadow` (S, N)."""
    if len(shadow) < 2:
        raise ValueError(f"a Gaussian needs two shadow models or more, not {len(shadow)}")
    variance = shadow.var(0)
    std = (variance.mean() if pooled else variance).sqrt().clamp(min=FLOOR)
    return -0.5 * ((x - shadow.mean(0)) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)


def attack(unlearned: Tensor, never: Tensor, *, pooled: bool = False, fpr: float = 0.01) -> Attack:
    """Attack the shadow models themselves, each held out of its own fit; both are confidences (S, N), S >= 3.

    One model of each kind is held out at a time: holding out one alone would move its own side's mean away from it,
    and the attack on two kinds that do not differ would fall below one half. Needs scikit-learn.
    """
    from sklearn.metrics import auc, roc_curve

    if unlearned.shape != never.shape:
        raise ValueError(f"as many models of each kind are needed, not {unlearned.shape} and {never.shape}")
    hits_of, alarms_of = [], []
    for held in range(len(never)):
        rest = torch.arange(len(never)) != held
        hits_of.append(log_ratio(unlearned[held], unlearned[rest], never[rest], pooled=pooled))
        alarms_of.append(log_ratio(never[held], unlearned[rest], never[rest], pooled=pooled))
    hits, alarms = torch.cat(hits_of), torch.cat(alarms_of)
    right = torch.cat([hits > 0, alarms < 0]).double() + torch.cat([hits == 0, alarms == 0]).double() / 2
    truth = torch.cat([torch.ones(len(hits)), torch.zeros(len(alarms))])
    false, true, _ = roc_curve(truth.numpy(), torch.cat([hits, alarms]).numpy(), drop_intermediate=False)
    return Attack(right.mean().item(), float(auc(false, true)), float(true[false <= fpr].max()), fpr)
