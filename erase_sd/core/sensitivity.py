"""Connection sensitivity (Wu & Harandi 2024, Eq. 1-2) and the exact global top-k of it.

s_j = theta_j dL_f/dtheta_j = dL_f(c * theta)/dc_j  at c = 1:  how the loss changes when connection j is cut.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from erase_sd.common.rng import generator
from erase_sd.core.task import REPLICATED, Loss, Params, Shards, Task, gradient

CHUNK = 1 << 16  # entries ranked at a time: bounds the extra memory whatever the size of the model or of a tensor
BINS = 1 << 16
# The upper halves of fp32 bit patterns from the largest number to the smallest: negative ones order backwards.
DESCENDING = np.concatenate([np.arange(BINS // 2)[::-1], np.arange(BINS // 2, BINS)])
NOT_FINITE = (np.arange(BINS) & 0x7F80) == 0x7F80  # an exponent of ones


def same(g: Tensor) -> Tensor:
    """Return a batch's gradient as it is: what `accumulate` averages by default."""
    return g


def accumulate(
    task: Task,
    loss: Loss,
    params: dict[str, nn.Parameter],
    purpose: str,
    batches: Iterable[int],
    each: Callable[[Tensor], Tensor] = same,
    done: tuple[int, Params] | None = None,
) -> Iterator[Params]:
    """Yield the running mean of the gradient of `loss` after each numbered batch; the last is the result.

    It is one set of fp32 tensors, updated in place, and only one batch's gradient exists beside it. `each` is applied
    to a batch's gradient before averaging: `torch.square` gives the empirical Fisher information per batch,
    `torch.abs` the sum inside the released Scissorhands code. `done` is the number of earlier batches and their mean,
    which is updated too. Raises FloatingPointError as `gradient` does.
    """
    first, mean = done or (0, {})
    for n, b in enumerate(batches, start=first + 1):
        for name, g in gradient(task, loss, task.batch(purpose, b), params).items():
            mean[name] = each(g) if n == 1 else mean[name].lerp_(each(g), 1 / n)
        yield mean


def averages(
    task: Task,
    passes: dict[str, tuple[Loss, Callable[[Tensor], Tensor]]],
    params: dict[str, nn.Parameter],
    batches: int,
    state: dict | None = None,
) -> Generator[tuple[dict, dict], None, dict[str, Params]]:
    """Yield (record, state) after each of the first `batches` sensitivity batches of each named pass (loss, each).

    Returns {pass: mean gradient}, see `accumulate`. The state {"step": 0, "measured": batches of all passes so far,
    "sums": {"<pass>/<parameter>": running mean}} continues bit for bit; its tensors are updated in place.
    """
    measured, sums = (state["measured"], state["sums"]) if state else (0, {})
    means: dict[str, Params] = {}
    for number, (name, (loss, each)) in enumerate(passes.items()):
        means[name] = {}
        for parameter, p in params.items():
            key = f"{name}/{parameter}"
            if key in sums:
                means[name][parameter] = sums[key].to(p.device)
        start = min(batches, max(0, measured - number * batches))
        for _ in accumulate(task, loss, params, "sensitivity", range(start, batches), each, (start, means[name])):
            measured += 1
            sums = _keyed(means)
            yield {"phase": "sensitivity"}, {"step": 0, "measured": measured, "sums": sums}
    return means


def _keyed(means: dict[str, Params]) -> Params:
    """Return the means of all passes by "<pass>/<parameter>"."""
    flat: Params = {}
    for name, mean in means.items():
        for parameter, x in mean.items():
            flat[f"{name}/{parameter}"] = x
    return flat


def connection_sensitivity(theta: Params, g: Params, saliency: Literal["abs", "signed"] = "abs") -> Params:
    """Return Eq. 2 of the paper: s = theta g to the letter ("signed"), or its size |theta g| ("abs"), by parameter."""
    s: Params = {}
    for name, x in g.items():
        s[name] = theta[name].detach() * x
        if saliency == "abs":
            s[name].abs_()
    return s


def magnitude(theta: Params) -> Params:
    """Return |theta|: what pruning ranks by, whatever the forget set is."""
    sizes: Params = {}
    for name, p in theta.items():
        sizes[name] = p.detach().abs()
    return sizes


def chance(theta: Params, seed: int, shards: Shards = REPLICATED) -> Params:
    """Return uniform random numbers, shaped like theta: what any ranking has to beat."""
    counts = torch.tensor([p.numel() for p in theta.values()])
    starts, totals = shards.exclusive_scan(counts).tolist(), shards.all_reduce(counts).tolist()
    scores: Params = {}
    for (name, p), start, n in zip(theta.items(), starts, totals, strict=True):
        draws = torch.rand(n, generator=generator(seed, "chance", name))
        scores[name] = draws[start : start + p.numel()].view(p.shape).to(p.device)
    return scores


def contrastive(
    theta: Params, g_f: Params, fisher_f: Params, fisher_r: Params, eps: float, shards: Shards = REPLICATED
) -> Params:
    """Return |theta g_f| F_f / (F_r + eps mean(F_r)): connections the forget set needs and the retain set does not.

    Not in the paper, whose Remark 1 admits any saliency. F_f and F_r are empirical Fisher informations shaped like
    theta, mean(F_r) runs over all their entries, and `eps` > 0 keeps a weight that nothing needs from winning.
    """
    sums = torch.tensor([x.sum(dtype=torch.float32) for x in fisher_r.values()], dtype=torch.float64)
    floor = eps * float(shards.all_reduce(sums.sum())) / entries(fisher_r, shards)
    scores: Params = {}
    for name, s in connection_sensitivity(theta, g_f, "abs").items():
        scores[name] = s * (fisher_f[name] / (fisher_r[name] + floor))
    return scores


def entries(scores: Params, shards: Shards = REPLICATED) -> int:
    """Return the number of entries over all tensors and shards."""
    here = sum(s.numel() for s in scores.values())
    return int(shards.all_reduce(torch.tensor(here)))


def top_k(scores: Params, k: int, strict: bool = False, shards: Shards = REPLICATED) -> dict[str, Tensor]:
    """Return boolean masks, shaped like the scores, of the k largest fp32 scores over all tensors and shards together.

    Exactly k entries: those tied at the threshold enter in (parameter, flat index) order. `strict` is the released
    code's rule instead, s > the (k+1)-th largest, which leaves the tied ones out and so selects k at most.
    Raises ValueError unless 0 <= k <= all entries, FloatingPointError for NaN or infinity in a score.
    """
    strict = strict and k < entries(scores, shards)
    tau, wanted, tied = _threshold(scores, k + strict, shards)
    if strict:
        wanted = 0
    ties = _entering(scores, tau, wanted, shards) if 0 < wanted < tied else {}
    selects = torch.ge if 0 < wanted == tied else torch.gt
    masks = {}
    for name, s in scores.items():
        masks[name] = torch.empty(s.shape, dtype=torch.bool, device=s.device)
        rest = masks[name].view(-1)
        for chunk in _chunks(s.detach()):
            mask, rest = rest[: len(chunk)], rest[len(chunk) :]
            selects(chunk, tau, out=mask)
            if ties.get(name):
                entering = (chunk == tau).nonzero()[: ties[name]]
                mask[entering] = True
                ties[name] -= len(entering)
    return masks


def threshold(scores: Params, k: int, shards: Shards = REPLICATED) -> tuple[float, int]:
    """Return the k-th largest fp32 score, and how many of the entries equal to it belong to the k largest.

    Exact, with O(65k) extra memory: two histogram passes over the upper and the lower half of the bit patterns.
    Infinity for k = 0. Raises as `top_k` does.
    """
    tau, wanted, _ = _threshold(scores, k, shards)
    return tau, wanted


def _threshold(scores: Params, k: int, shards: Shards) -> tuple[float, int, int]:
    """Return the threshold, how many of the entries equal to it are wanted, and how many there are."""
    total = entries(scores, shards)
    if not 0 <= k <= total:
        raise ValueError(f"cannot select {k} of {total} scores")
    if k == 0:
        return float("inf"), 0, 0
    upper = _upper_halves(scores, shards)
    high, k = _descend(upper, DESCENDING, k)
    lower = np.zeros(BINS, dtype=np.int64)
    for s in scores.values():
        for bits in _bits(s):
            lower += np.bincount(bits[bits >> 16 == high] & (BINS - 1), minlength=BINS)
    lower = shards.all_reduce(torch.from_numpy(lower)).numpy()
    low, k = _descend(lower, np.arange(BINS)[:: -1 if high < BINS // 2 else 1], k)
    tau = np.array(high << 16 | low, dtype=np.uint32).view(np.float32).item()
    return tau, k, int(lower[low])


def _upper_halves(scores: Params, shards: Shards) -> np.ndarray:
    """Return how often each upper half of a bit pattern occurs on all shards: int64 (BINS,).

    Raises FloatingPointError, on every rank, naming the first parameter with a score that is not finite.
    """
    histogram = np.zeros(BINS, dtype=np.int64)
    bad = []
    for s in scores.values():
        for bits in _bits(s):
            histogram += np.bincount(bits >> 16, minlength=BINS)
        bad.append(bool(histogram[NOT_FINITE].any()))  # from the first bad parameter on
    everywhere = shards.all_reduce(torch.tensor(bad).long())
    if everywhere.any():
        first = int(everywhere.nonzero()[0])
        raise FloatingPointError(f"a score of {list(scores)[first]} is NaN or infinite")
    return shards.all_reduce(torch.from_numpy(histogram)).numpy()


def _entering(scores: Params, tau: float, wanted: int, shards: Shards) -> dict[str, int]:
    """Return how many of this shard's entries equal to tau are among the first `wanted` by parameter and index."""
    tied = []
    for s in scores.values():
        tied.append(sum(int((chunk == tau).sum()) for chunk in _chunks(s.detach())))
    here = torch.tensor(tied)
    everywhere = shards.all_reduce(here)
    first = everywhere.cumsum(0) - everywhere + shards.exclusive_scan(here)
    return dict(zip(scores, torch.minimum((wanted - first).clamp(min=0), here).tolist(), strict=True))


def _bits(s: Tensor) -> Iterator[np.ndarray]:
    """Yield the fp32 bit patterns of the entries, uint32, chunk by chunk; those of -0.0 become those of 0.0."""
    for chunk in _chunks(s.detach()):
        yield (chunk.cpu() + 0.0).numpy().view(np.uint32)


def _descend(histogram: np.ndarray, order: np.ndarray, k: int) -> tuple[int, int]:
    """Return the bin that holds the k-th entry when the bins are in this order, and its rank (from 1) inside it."""
    so_far = histogram[order].cumsum()
    i = int(np.searchsorted(so_far, k))
    return int(order[i]), k - int(so_far[i] - histogram[order[i]])


def _chunks(s: Tensor) -> Iterator[Tensor]:
    """Yield the entries in the order of their flat index, fp32, at most CHUNK at a time; never a copy of more."""
    if s.is_contiguous():
        for chunk in s.view(-1).split(CHUNK):
            yield chunk.float()
        return
    for rows in s.split(max(1, CHUNK * len(s) // s.numel())):  # channels_last, say: as many rows as fit
        if rows.numel() <= CHUNK:
            yield rows.reshape(-1).float()
        else:
            yield from _chunks(rows[0])
