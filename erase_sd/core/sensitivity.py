"""Connection sensitivity (Wu & Harandi 2024, Eq. 1-2) and the exact global top-k of it.

s_j = theta_j dL_f/dtheta_j = dL_f(c * theta)/dc_j  at c = 1:  what the loss feels when connection j is cut.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from erase_sd.core.task import Params, Task, gradient
from erase_sd.runtime import generator

CHUNK = 1 << 20  # entries ranked at a time: bounds the extra memory whatever the size of the model
BINS = 1 << 16


def accumulate(
    task: Task,
    loss: Callable[[Any], Tensor],
    params: dict[str, nn.Parameter],
    purpose: str,
    batches: Iterable[int],
    each: Callable[[Tensor], Tensor] = lambda g: g,
) -> Iterator[Params]:
    """Mean gradient of `loss` over the numbered batches; yields the running mean after each, the last is the result.

    It is one set of fp32 tensors, updated in place, and only one batch's gradient exists beside it. `each` is applied
    to a batch's gradient before averaging: `torch.square` gives the empirical Fisher information per batch,
    `torch.abs` the sum inside the released Scissorhands code. Raises FloatingPointError as `gradient` does.
    """
    mean: Params = {}
    for n, b in enumerate(batches, start=1):
        for name, g in gradient(task, loss(task.batch(purpose, b)), params).items():
            mean[name] = each(g) if n == 1 else mean[name].lerp_(each(g), 1 / n)
        yield mean


def connection_sensitivity(theta: Params, g: Params, saliency: Literal["abs", "signed"] = "abs") -> Params:
    """Eq. 2 of the paper: s = theta g to the letter ("signed"), or its size |theta g| ("abs"). Shapes of theta."""
    s = {name: theta[name].detach() * g[name] for name in g}
    return {name: x.abs_() for name, x in s.items()} if saliency == "abs" else s


def magnitude(theta: Params) -> Params:
    """|theta|: what pruning ranks by, whatever the forget data are."""
    return {name: p.detach().abs() for name, p in theta.items()}


def chance(theta: Params, seed: int) -> Params:
    """Uniform numbers: what any ranking has to beat."""
    draw = lambda name, p: torch.rand(p.shape, generator=generator(seed, "chance", name)).to(p.device)  # noqa: E731
    return {name: draw(name, p) for name, p in theta.items()}


def contrastive(theta: Params, g_f: Params, fisher_f: Params, fisher_r: Params, eps: float) -> Params:
    """|theta g_f| F_f / (F_r + eps mean(F_r)): connections the forget data need and the retain data do not.

    Not in the paper, whose Remark 1 admits any saliency. F_f and F_r are empirical Fisher informations shaped like
    theta, mean(F_r) runs over all their entries, and `eps` > 0 keeps a weight that nothing needs from winning.
    """
    entries = sum(x.numel() for x in fisher_r.values())
    floor = eps * sum(float(x.sum(dtype=torch.float32)) for x in fisher_r.values()) / entries
    s = connection_sensitivity(theta, g_f, "abs")
    return {name: x * (fisher_f[name] / (fisher_r[name] + floor)) for name, x in s.items()}


def top_k(scores: Params, k: int, strict: bool = False) -> dict[str, Tensor]:
    """Boolean masks, shaped like the scores, of the k largest fp32 scores over all tensors together.

    Exactly k entries: those tied at the threshold enter in (parameter, flat index) order. `strict` is the released
    code's rule instead, s > the (k+1)-th largest, which leaves the tied ones out and so selects k at most.
    Raises ValueError unless 0 <= k <= all entries, FloatingPointError for NaN or infinity in a score.
    """
    tau, wanted = threshold(scores, k)
    if strict and k < sum(s.numel() for s in scores.values()):
        tau, wanted = threshold(scores, k + 1)[0], 0
    masks = {}
    for name, s in scores.items():
        masks[name] = s.float() > tau
        if wanted:
            tied = _first(s.float() == tau, wanted)
            wanted -= int(tied.sum())
            masks[name] |= tied
    return masks


def threshold(scores: Params, k: int) -> tuple[float, int]:
    """The k-th largest fp32 score, and how many of the entries equal to it belong to the k largest.

    Exact, with O(65k) extra memory: two histogram passes over the upper and the lower half of a 32-bit key that orders
    like the scores. Infinity for k = 0. Raises as `top_k` does.
    """
    total = sum(s.numel() for s in scores.values())
    if not 0 <= k <= total:
        raise ValueError(f"cannot select {k} of {total} scores")
    if k == 0:
        return float("inf"), 0
    upper = sum(np.bincount((key >> 16) + BINS // 2, minlength=BINS) for key in _keys(scores))
    high, k = _descend(upper, k)
    high -= BINS // 2
    lower = sum(np.bincount(key[key >> 16 == high] & (BINS - 1), minlength=BINS) for key in _keys(scores))
    low, k = _descend(lower, k)
    key = np.array([(high << 16) | low], dtype=np.int32)
    return _flip(key).view(np.float32).item(), k


def _keys(scores: Params) -> Iterator[np.ndarray]:
    """int32 keys ordered like the scores, chunk by chunk; -0.0 ranks as 0.0."""
    for name, s in scores.items():
        for chunk in s.detach().reshape(-1).split(CHUNK):
            x = chunk.float().cpu() + 0.0
            if not x.isfinite().all():
                raise FloatingPointError(f"a score of {name} is NaN or infinite")
            yield _flip(x.numpy().view(np.int32))


def _flip(b: np.ndarray) -> np.ndarray:
    """Bits of fp32 <-> key, its own inverse: negative floats order backwards, so their 31 lower bits are inverted."""
    return b ^ ((b >> 31) & 0x7FFFFFFF)


def _descend(histogram: np.ndarray, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest entry, and the entry's rank (from 1) inside that bin."""
    from_top = histogram[::-1].cumsum()
    i = int(np.searchsorted(from_top, k))
    return len(histogram) - 1 - i, k - int(from_top[i] - histogram[::-1][i])


def _first(mask: Tensor, n: int) -> Tensor:
    """The mask with only its first n true entries, by flat index."""
    mask = mask.contiguous()
    flat = mask.view(-1)
    flat[flat.nonzero()[n:]] = False
    return mask
