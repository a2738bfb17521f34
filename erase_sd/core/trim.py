"""Trim: re-initialise the selected connections in place (Wu & Harandi 2024, Algorithm 1, first half)."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from erase_sd.common.rng import generator
from erase_sd.core.task import REPLICATED, Shards


def uniform(fan_in: int, n: int, rng: Generator) -> Tensor:
    """Draw from [-fan_in^-1/2, fan_in^-1/2], as torch initialises linear and convolutional layers."""
    return _between(fan_in**-0.5, n, rng)


def normal(fan_in: int, n: int, rng: Generator) -> Tensor:
    """Draw from a normal distribution with the variance of `uniform`."""
    return torch.randn(n, generator=rng) * (3 * fan_in) ** -0.5


def kaiming(fan_in: int, n: int, rng: Generator) -> Tensor:
    """Draw from Kaiming's uniform distribution for ReLU (authors-nsfw)."""
    return _between((6 / fan_in) ** 0.5, n, rng)


def truncated(fan_in: int, n: int, rng: Generator) -> Tensor:
    """Draw from a normal distribution of deviation 0.02, cut at +-2 (authors-cls)."""
    return nn.init.trunc_normal_(torch.empty(n), std=0.02, a=-2.0, b=2.0, generator=rng)


def zeros(fan_in: int, n: int, rng: Generator) -> Tensor:
    """Return zeros."""
    return torch.zeros(n)


def ones(fan_in: int, n: int, rng: Generator) -> Tensor:
    """Return ones."""
    return torch.ones(n)


def _between(bound: float, n: int, rng: Generator) -> Tensor:
    return torch.empty(n).uniform_(-bound, bound, generator=rng)


INITS: dict[str, Callable[[int, int, Generator], Tensor]] = {
    "uniform": uniform,
    "normal": normal,
    "kaiming": kaiming,
    "truncated": truncated,
    "zeros": zeros,
    "ones": ones,
}
"""(fan_in, how many values, generator) -> the new values of a weight."""


@torch.no_grad()
def reinitialise_(
    params: dict[str, nn.Parameter], masks: dict[str, Tensor], init: str, seed: int, shards: Shards = REPLICATED
) -> dict[str, int]:
    """Give the masked entries of `params` new values in place; return how many really changed, per parameter.

    `masks` are boolean, shaped like their parameters; masks of other parameters are ignored. Only masked entries are
    drawn, each parameter's from its own generator, so that one mask never changes another's draws; every shard draws
    those of all shards and takes its own. One-dimensional parameters (biases) become 0 whatever `init` says.
    Raises KeyError for an unknown init.
    """
    draw = INITS[init]
    chosen = torch.tensor([int(masks[name].sum()) for name in params], dtype=torch.int64)
    starts, totals = shards.exclusive_scan(chosen).tolist(), shards.all_reduce(chosen).tolist()
    changed = []
    for (name, p), start, n in zip(params.items(), starts, totals, strict=True):
        mask = masks[name].to(p.device)
        before = p[mask]
        after = torch.zeros_like(before)
        if p.ndim > 1:
            values = draw(p.shape[1:].numel(), n, generator(seed, "trim", name))
            after = values[start : start + len(before)].to(before)
        p[mask] = after
        changed.append(int((after != before).sum()))
    everywhere = shards.all_reduce(torch.tensor(changed, dtype=torch.int64)).tolist()
    return dict(zip(params, everywhere, strict=True))
