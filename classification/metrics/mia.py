"""The paper's membership inference attack: an SVC that tells D_r from D_t by the model's own confidences.

It is SVC_MIA_forget_efficacy of Jia et al., "Model sparsity can simplify machine unlearning", arXiv 2304.04934, with
three defects of the released code mended. Its shadow members are the first examples of D_r, which a data set sorted by
class or identity makes a biased choice: here they are drawn at random. Its modified entropy mixes up the labels of a
batch: here it is that of Song & Mittal, arXiv 2003.10595. And it is quadratic in the shadow set, which can be capped.

It is a population attack: it bounds no single example's privacy (arXiv 2403.01218), for which see `lira`.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from erase_sd.common.errors import UserError
from erase_sd.common.rng import generator

TINY = 1e-30  # smaller probabilities count as this one in logarithms, as in the released code


class Outputs(NamedTuple):
    """The outputs of a model for a set of examples, and what would be right."""

    logits: Tensor  # (N, K)
    labels: Tensor  # (N,) int64, the true ones


def svc_attack(
    retain: Outputs,
    test: Outputs,
    forget: Outputs,
    *,
    features: Sequence[str] = ("confidence",),
    shadow: Literal["random", "first"] = "random",
    cap: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Return, by feature, the share in [0, 1] of D_f that is taken for unseen. The aim is Retrain's, not 0 or 1.

    Shadow members are n examples of D_r and non-members n of D_t, n = min(|D_r|, |D_t|, cap): drawn by `seed`, or the
    "first" ones as in the released code. The SVC costs O(n^2). Needs scikit-learn. Raises UserError for an unknown
    feature and ValueError where there is an empty set.
    """
    unknown = sorted(set(features) - FEATURES.keys())
    if unknown:
        raise UserError(f"unknown MIA feature {unknown[0]}: choose among {', '.join(FEATURES)}")
    n = min(len(retain.labels), len(test.labels))
    if cap is not None:
        n = min(n, cap)
    if n < 1 or not len(forget.labels):
        raise ValueError("the attack needs examples to retain, to test and to forget")
    members, others = retain, test
    if shadow == "random":
        members, others = _drawn(retain, seed, "retain"), _drawn(test, seed, "test")
    members = Outputs(members.logits[:n], members.labels[:n])
    others = Outputs(others.logits[:n], others.labels[:n])
    shares = {}
    for name in features:
        feature = FEATURES[name]
        shares[name] = _unseen(_features(feature, members), _features(feature, others), _features(feature, forget))
    return shares


def _features(feature: Callable[[Tensor, Tensor], Tensor], x: Outputs) -> Tensor:
    """Return a feature (N, d) of a model's outputs."""
    return feature(probabilities(x), x.labels)


def _drawn(x: Outputs, seed: int, name: str) -> Outputs:
    """Return the examples in a random order of (seed, name)."""
    order = torch.randperm(len(x.labels), generator=generator(seed, "mia", name))
    return Outputs(x.logits[order], x.labels[order])


def _unseen(members: Tensor, others: Tensor, forget: Tensor) -> float:
    """Return the share of `forget` that an SVC, trained on features (n, d) of the other two, calls no member."""
    from sklearn.svm import SVC

    truth = [1] * len(members) + [0] * len(others)
    svc = SVC(C=3, kernel="rbf", gamma="auto").fit(torch.cat([members, others]).numpy(), truth)
    return 1 - float(svc.predict(forget.numpy()).mean())


def probabilities(x: Outputs) -> Tensor:
    """Return probabilities (N, K) in float64: confidences above 1 - 1e-8 still differ."""
    return x.logits.double().softmax(1)


def correctness(p: Tensor, y: Tensor) -> Tensor:
    """Return 1 where the most probable class is the true one, (N, 1)."""
    return (p.argmax(1) == y).to(p)[:, None]


def confidence(p: Tensor, y: Tensor) -> Tensor:
    """Return the probability of the true class, (N, 1): the paper's feature."""
    return p.gather(1, y[:, None])


def entropy(p: Tensor, y: Tensor) -> Tensor:
    """Return -sum_k p_k log p_k, (N, 1)."""
    return torch.special.entr(p).sum(1, keepdim=True)


def m_entropy(p: Tensor, y: Tensor) -> Tensor:
    """Return -(1 - p_y) log p_y - sum_{k != y} p_k log(1 - p_k), (N, 1): entropy given which class is true."""
    p_y = confidence(p, y)
    all_k = -p * (1 - p).clamp(min=TINY).log()
    return -(1 - p_y) * p_y.clamp(min=TINY).log() + all_k.sum(1, keepdim=True) - confidence(all_k, y)


def all_probabilities(p: Tensor, y: Tensor) -> Tensor:
    """Return all probabilities (N, K)."""
    return p


FEATURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "correctness": correctness,
    "confidence": confidence,
    "entropy": entropy,
    "m_entropy": m_entropy,
    "prob": all_probabilities,
}
"""Name: features (N, d) of probabilities (N, K) and true labels (N,)."""
