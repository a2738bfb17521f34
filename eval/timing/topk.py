"""Exact top k over all tensors, by histograms, against concatenation and `torch.kthvalue`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import median

import torch
from torch import Tensor

from erase_sd.common.rng import generator
from erase_sd.core.sensitivity import threshold, top_k
from erase_sd.core.task import Params
from eval.timing.clock import interleaved, line, ratio
from eval.timing.fresh import extra
from eval.timing.settings import TimingSuite, TopK


def lines(suite: TimingSuite, sizes: TopK) -> Iterator[str]:
    """Time and peak memory, for many tensors and for a single one. Raises RuntimeError if the results differ."""
    for tensors in dict.fromkeys((min(sizes.tensors, sizes.scores), 1)):
        what = f"{sizes.scores:,} scores in {tensors} tensor{'s' * (tensors > 1)}"
        yield timed(suite, sizes, tensors, what)
        size = 4 * sizes.scores
        ours, theirs = (extra(made, way, sizes.scores, tensors, sizes.share) for way in (top_k, joined))
        detail = f"{ours / 2**20:.1f} MiB beside the masks; kthvalue {theirs / size:.3g}"
        yield line("topk", f"{what}, extra memory / scores", ours / size, "<= 0.02", detail)


def timed(suite: TimingSuite, sizes: TopK, tensors: int, what: str) -> str:
    """The ratio of the times, after a comparison of the results, which also warms up."""
    scores, k = made(sizes.scores, tensors, sizes.share)
    tied = compare(scores, k)
    ways = {"ours": partial(top_k, scores, k), "theirs": partial(joined, scores, k)}
    seconds = interleaved(ways, suite.rounds)
    ours, theirs = (median(times) for times in seconds.values())
    detail = f"{ours:.3f} s / {theirs:.3f} s, the same {k:,} entries, {tied} more that tie in kthvalue's"
    return line("topk", f"{what}, time / kthvalue", ratio(*seconds.values()), "<= 1.2", detail)


def made(n: int, tensors: int, share: float) -> tuple[Params, int]:
    """n scores like |theta g|, and how many of them to select."""
    scores = {str(i): torch.empty(len(part)) for i, part in enumerate(torch.empty(n).tensor_split(tensors))}
    for name, s in scores.items():
        s.normal_(generator=generator(0, "topk", name)).abs_()
    return scores, max(1, round(share * n))


def joined(scores: Params, k: int) -> Params:
    """The usual way, as the released code has it: one vector of all scores, its k-th largest, masks of what is above.

    Ties at the threshold all enter, so that more than k entries may be selected.
    """
    flat = torch.cat([s.reshape(-1) for s in scores.values()])
    tau = flat.kthvalue(len(flat) - k + 1).values
    return {name: s >= tau for name, s in scores.items()}


def compare(scores: Params, k: int) -> int:
    """How many tied entries kthvalue's masks have beyond the k largest. Raises RuntimeError for another difference."""
    ours, theirs, tau = top_k(scores, k), joined(scores, k), threshold(scores, k)[0]
    more = {name: theirs[name] & ~ours[name] for name in ours}
    lacking = any(bool((ours[name] & ~theirs[name]).any()) for name in ours)
    if lacking or total(ours) != k or any(bool((scores[name][more[name]] != tau).any()) for name in more):
        raise RuntimeError("top_k and kthvalue select different entries")
    return total(more)


def total(masks: dict[str, Tensor]) -> int:
    """How many entries are selected."""
    return sum(int(mask.sum()) for mask in masks.values())
