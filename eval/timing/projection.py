"""The projection in closed form against the released way: one float64 vector on the host, and a quadratic program."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from statistics import median

import torch
from torch import Tensor

from erase_sd.common.rng import generator
from erase_sd.core.projection import coefficient, dual, products, subtract_
from erase_sd.core.task import Params
from eval.timing.clock import interleaved, line, ratio
from eval.timing.fresh import extra
from eval.timing.settings import Projection, TimingSuite


def lines(suite: TimingSuite, sizes: Projection) -> Iterator[str]:
    """Yield time and peak memory. Raises RuntimeError if the results differ."""
    parts = min(sizes.parts, sizes.parameters)
    what = f"{sizes.parameters:,} parameters"
    yield timed(suite, sizes.parameters, parts, what)
    ours = extra(made, closed, sizes.parameters, parts)
    theirs = extra(made, on_host, sizes.parameters, parts)
    held = 2 * 4 * sizes.parameters
    detail = f"both gradients included: {(held + ours) / 2**30:.2f} GiB / {(held + theirs) / 2**30:.2f} GiB; "
    detail += f"beyond them {ours / held:.2g} and {theirs / held:.2g} of their size"
    yield line("projection", f"{what}, memory / float64 QP's", (held + ours) / (held + theirs), "<= 0.25", detail)


def timed(suite: TimingSuite, n: int, parts: int, what: str) -> str:
    """Return the ratio of the times, after a comparison of the results, which also warms up."""
    g, g_f = made(n, parts)
    apart = compare(g, g_f)
    ways = {"theirs": partial(on_host, g, g_f), "ours": partial(closed, g, g_f)}
    seconds = interleaved(ways, suite.rounds, prepare=partial(draw_, g, g_f))
    detail = f"{median(seconds['theirs']):.3f} s / {median(seconds['ours']):.3f} s, "
    detail += f"results differ by {apart:.0e} of the largest entry"
    value = ratio(seconds["theirs"], seconds["ours"])
    return line("projection", f"{what}, float64 QP's time / closed form's", value, ">= 10", detail)


def made(n: int, parts: int) -> tuple[Params, Params]:
    """Return a gradient g and a forget gradient g_f that it runs along, n entries each, in `parts` tensors."""
    g: Params = {}
    g_f: Params = {}
    for i, part in enumerate(torch.empty(n).tensor_split(parts)):
        g_f[str(i)] = torch.empty(len(part)).normal_(generator=generator(0, "g_f", i))
        g[str(i)] = torch.empty(len(part))
    draw_(g, g_f)
    return g, g_f


def draw_(g: Params, g_f: Params) -> None:
    """Draw the gradient before the projection, again."""
    for name, x in g.items():
        x.normal_(generator=generator(0, "g", name)).add_(g_f[name], alpha=0.1)


def closed(g: Params, g_f: Params) -> None:
    """Project g as `core.repair` does it, with the third product, |g|^2, which it records."""
    dot_of, _, norm2_f = products(g, g_f).tolist()
    subtract_(g, g_f, coefficient(dot_of, norm2_f))


def on_host(g: Params, g_f: Params) -> None:
    """Project g as GEM's project2cone2 does for one memory, in the released code's order of copies.

    Its solver is the exact one of `erase_sd.core.projection`.
    """
    gradient, memory = flat(g).double(), flat(g_f).double()
    v = dual((memory @ memory).view(1, 1), -(memory @ gradient).view(1))
    rest = (gradient - v * memory).float()
    for x in g.values():
        part, rest = rest[: x.numel()], rest[x.numel() :]
        x.copy_(part.view(x.shape))


def flat(x: Params) -> Tensor:
    """Return all entries in one vector on the host."""
    return torch.cat([part.reshape(-1) for part in x.values()]).cpu()


def compare(g: Params, g_f: Params) -> float:
    """Return the largest difference of the two results in the first tensor, relative to its largest entry."""
    name = next(iter(g))
    closed(g, g_f)
    ours = g[name].clone()
    draw_(g, g_f)
    on_host(g, g_f)
    apart = float((ours - g[name]).abs().max() / ours.abs().max())
    if apart > 1e-5:
        raise RuntimeError(f"the closed form and the quadratic program differ by {apart}")
    return apart
