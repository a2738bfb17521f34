"""Exact top k over all tensors, by histograms, against concatenation and `torch.kthvalue`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import median

import torch

from erase_sd.common.rng import generator
from erase_sd.core.sensitivity import threshold, top_k
from erase_sd.core.task import Params
from eval.timing.clock import interleaved, line, ratio
from eval.timing.fresh import extra
from eval.timing.settings import TimingSuite, TopK


def lines(suite: TimingSuite, sizes: TopK) -> Iterator[str]:
    """Yield time and peak memory, for many tensors and for a single one. Raises RuntimeError if the results differ."""
    for tensors in dict.fromkeys((min(sizes.tensors, sizes.scores), 1)):
        what = f"{sizes.scores:,} scores in {tensors} tensor"
        if tensors > 1:
            what += "s"
        yield timed(suite, sizes, tensors, what)
        size = 4 * sizes.scores
        ours = extra(made, top_k, sizes.scores, tensors, sizes.share)
        theirs = extra(made, joined, sizes.scores, tensors, sizes.share)
        detail = f"{ours / 2**20:.1f} MiB beside the masks; kthvalue {theirs / size:.3g}"
        yield line("topk", f"{what}, extra memory / scores", ours / size, "<= 0.02", detail)


def timed(suite: TimingSuite, sizes: TopK, tensors: int, what: str) -> str:
    """Return the ratio of the times, after a comparison of the results, which also warms up."""
    scores, k = made(sizes.scores, tensors, sizes.share)
    tied = compare(scores, k)
    ways = {"ours": partial(top_k, scores, k), "theirs": partial(joined, scores, k)}
    seconds = interleaved(ways, suite.rounds)
    ours, theirs = median(seconds["ours"]), median(seconds["theirs"])
    detail = f"{ours:.3f} s / {theirs:.3f} s, the same {k:,} entries, {tied} more that tie in kthvalue's"
    return line("topk", f"{what}, time / kthvalue", ratio(seconds["ours"], seconds["theirs"]), "<= 1.2", detail)


def made(n: int, tensors: int, share: float) -> tuple[Params, int]:
    """Return n scores like |theta g|, and how many of them to select."""
    scores = {}
    for i, part in enumerate(torch.empty(n).tensor_split(tensors)):
        scores[str(i)] = torch.empty(len(part)).normal_(generator=generator(0, "topk", str(i))).abs_()
    return scores, max(1, round(share * n))


def joined(scores: Params, k: int) -> Params:
    """Return masks made the usual way, as the released code has it: one vector, its k-th largest, what is above.

    Ties at the threshold all enter, so that more than k entries may be selected.
    """
    flat = torch.cat([s.reshape(-1) for s in scores.values()])
    tau = flat.kthvalue(len(flat) - k + 1).values
    return {name: s >= tau for name, s in scores.items()}


def compare(scores: Params, k: int) -> int:
    """Return how many tied entries kthvalue's masks have beyond the k largest.

    Raises RuntimeError for another difference.
    """
    ours, theirs = top_k(scores, k), joined(scores, k)
    tau, *_ = threshold(scores, k)
    selected, ties = 0, 0
    same = True
    for name, s in scores.items():
        more = theirs[name] & ~ours[name]
        lacking = ours[name] & ~theirs[name]
        same = same and not bool(lacking.any()) and not bool((s[more] != tau).any())
        selected += int(ours[name].sum())
        ties += int(more.sum())
    if not same or selected != k:
        raise RuntimeError("top_k and kthvalue select different entries")
    return ties
