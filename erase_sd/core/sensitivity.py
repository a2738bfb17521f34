"""Connection sensitivity (Wu & Harandi 2024, Eq. 1-2) and the exact global top-k of it.

s_j = theta_j dL_f/dtheta_j = dL_f(c * theta)/dc_j  at c = 1:  what the loss feels when connection j is cut.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from erase_sd.common.rng import generator
from erase_sd.core.task import REPLICATED, Params, Shards, Task, gradient

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
    loss: Callable[[Any], Tensor],
    params: dict[str, nn.Parameter],
    purpose: str,
    batches: Iterable[int],
    each: Callable[[Tensor], Tensor] = same,
    done: tuple[int, Params] | None = None,
) -> Iterator[Params]:
    """Mean gradient of `loss` over the numbered batches; yields the running mean after each, the last is the result.

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
    passes: dict[str, tuple[Callable[[Any], Tensor], Callable[[Tensor], Tensor]]],
    params: dict[str, nn.Parameter],
    batches: int,
    state: dict | None = None,
) -> Generator[tuple[dict, dict], None, dict[str, Params]]:
    """The mean of each named pass (loss, each) over the first `batches` sensitivity batches, see `accumulate`.

    Yields (record, state) after each batch and returns {pass: mean}. The state {"step": 0, "measured": batches of all
    passes so far, "sums": {"<pass>/<parameter>": running mean}} continues bit for bit; its tensors are updated in
    place.
    """
    measured, sums = (state["measured"], state["sums"]) if state else (0, {})
    means: dict[str, Params] = {}
    for number, (name, (loss, each)) in enumerate(passes.items()):
        known = {p: sums[f"{name}/{p}"].to(params[p].device) for p in params if f"{name}/{p}" in sums}
        means[name] = known
        start = min(batches, max(0, measured - number * batches))
        for _ in accumulate(task, loss, params, "sensitivity", range(start, batches), each, (start, known)):
            measured += 1
            sums = {f"{q}/{p}": x for q, those in means.items() for p, x in those.items()}
            yield {"phase": "sensitivity"}, {"step": 0, "measured": measured, "sums": sums}
    return means


def connection_sensitivity(theta: Params, g: Params, saliency: Literal["abs", "signed"] = "abs") -> Params:
    """Eq. 2 of the paper: s = theta g to the letter ("signed"), or its size |theta g| ("abs"). Shapes of theta."""
    s = {name: theta[name].detach() * g[name] for name in g}
    return {name: x.abs_() for name, x in s.items()} if saliency == "abs" else s


def magnitude(theta: Params) -> Params:
    """|theta|: what pruning ranks by, whatever the forget data are."""
    return {name: p.detach().abs() for name, p in theta.items()}


def chance(theta: Params, seed: int, shards: Shards = REPLICATED) -> Params:
    """Uniform numbers: what any ranking has to beat."""
    sizes = torch.tensor([p.numel() for p in theta.values()])
    slices = zip(theta.items(), shards.before(sizes).tolist(), shards.total(sizes).tolist(), strict=True)
    draw = lambda name, n: torch.rand(n, generator=generator(seed, "chance", name))  # noqa: E731
    return {name: draw(name, n)[i : i + p.numel()].view(p.shape).to(p.device) for (name, p), i, n in slices}


def contrastive(
    theta: Params, g_f: Params, fisher_f: Params, fisher_r: Params, eps: float, shards: Shards = REPLICATED
) -> Params:
    """|theta g_f| F_f / (F_r + eps mean(F_r)): connections the forget data need and the retain data do not.

    Not in the paper, whose Remark 1 admits any saliency. F_f and F_r are empirical Fisher informations shaped like
    theta, mean(F_r) runs over all their entries, and `eps` > 0 keeps a weight that nothing needs from winning.
    """
    sums = torch.tensor([x.sum(dtype=torch.float32) for x in fisher_r.values()], dtype=torch.float64)
    floor = eps * float(shards.total(sums.sum())) / entries(fisher_r, shards)
    s = connection_sensitivity(theta, g_f, "abs")
    return {name: x * (fisher_f[name] / (fisher_r[name] + floor)) for name, x in s.items()}


def entries(scores: Params, shards: Shards = REPLICATED) -> int:
    """How many there are, over all tensors and shards."""
    return int(shards.total(torch.tensor(sum(s.numel() for s in scores.values()))))


def top_k(scores: Params, k: int, strict: bool = False, shards: Shards = REPLICATED) -> dict[str, Tensor]:
    """Boolean masks, shaped like the scores, of the k largest fp32 scores over all tensors and shards together.

    Exactly k entries: those tied at the threshold enter in (parameter, flat index) order. `strict` is the released
    code's rule instead, s > the (k+1)-th largest, which leaves the tied ones out and so selects k at most.
    Raises ValueError unless 0 <= k <= all entries, FloatingPointError for NaN or infinity in a score.
    """
    strict = strict and k < entries(scores, shards)
    tau, wanted, tied = _threshold(scores, k + strict, shards)
    wanted = 0 if strict else wanted
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
    """The k-th largest fp32 score, and how many of the entries equal to it belong to the k largest.

    Exact, with O(65k) extra memory: two histogram passes over the upper and the lower half of the bit patterns.
    Infinity for k = 0. Raises as `top_k` does.
    """
    return _threshold(scores, k, shards)[:2]


def _threshold(scores: Params, k: int, shards: Shards) -> tuple[float, int, int]:
    """The threshold, how many of the entries equal to it are wanted, and how many there are."""
    total = entries(scores, shards)
    if not 0 <= k <= total:
        raise ValueError(f"cannot select {k} of {total} scores")
    if k == 0:
        return float("inf"), 0, 0
    upper, lower = np.zeros(BINS, dtype=np.int64), np.zeros(BINS, dtype=np.int64)
    bad = []
    for s in scores.values():
        for bits in _bits(s):
            upper += np.bincount(bits >> 16, minlength=BINS)
        bad.append(bool(upper[NOT_FINITE].any()))
    if (bad := shards.total(torch.tensor(bad).long())).any():  # on every rank, whosever scores they are
        raise FloatingPointError(f"a score of {list(scores)[int(bad.nonzero()[0])]} is NaN or infinite")
    high, k = _descend(shards.total(torch.from_numpy(upper)).numpy(), DESCENDING, k)
    for s in scores.values():
        for bits in _bits(s):
            lower += np.bincount(bits[bits >> 16 == high] & (BINS - 1), minlength=BINS)
    lower = shards.total(torch.from_numpy(lower)).numpy()
    low, k = _descend(lower, np.arange(BINS)[:: -1 if high < BINS // 2 else 1], k)
    return np.array(high << 16 | low, dtype=np.uint32).view(np.float32).item(), k, int(lower[low])


def _entering(scores: Params, tau: float, wanted: int, shards: Shards) -> dict[str, int]:
    """How many of this shard's entries equal to tau are among the first `wanted`, by parameter and flat index."""
    here = torch.tensor([sum(int((chunk == tau).sum()) for chunk in _chunks(s.detach())) for s in scores.values()])
    everywhere = shards.total(here)
    first = everywhere.cumsum(0) - everywhere + shards.before(here)
    return dict(zip(scores, torch.minimum((wanted - first).clamp(min=0), here).tolist(), strict=True))


def _bits(s: Tensor) -> Iterator[np.ndarray]:
    """The bit patterns of the entries in fp32, uint32, chunk by chunk; those of -0.0 become those of 0.0."""
    return ((chunk.cpu() + 0.0).numpy().view(np.uint32) for chunk in _chunks(s.detach()))


def _descend(histogram: np.ndarray, order: np.ndarray, k: int) -> tuple[int, int]:
    """The bin that holds the k-th entry when the bins are in this order, and its rank (from 1) inside that bin."""
    so_far = histogram[order].cumsum()
    i = int(np.searchsorted(so_far, k))
    return int(order[i]), k - int(so_far[i] - histogram[order[i]])


def _chunks(s: Tensor) -> Iterator[Tensor]:
    """The entries in the order of their flat index, fp32, at most CHUNK at a time; never a copy of more than that."""
    if s.is_contiguous():
        for chunk in s.view(-1).split(CHUNK):
            yield chunk.float()
    else:  # channels_last, say: as many rows as fit
        for rows in s.split(max(1, CHUNK * len(s) // s.numel())):
            yield from [rows.reshape(-1).float()] if rows.numel() <= CHUNK else _chunks(rows[0])
