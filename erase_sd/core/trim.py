"""Trim: re-initialise the selected connections in place (Wu & Harandi 2024, Algorithm 1, first half)."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from erase_sd.common.rng import generator
from erase_sd.core.task import REPLICATED, Shards


def _uniform(bound: float, n: int, rng: Generator) -> Tensor:
    return torch.empty(n).uniform_(-bound, bound, generator=rng)


def _truncated(std: float, cut: float, n: int, rng: Generator) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(n), std=std, a=-cut, b=cut, generator=rng)


INITS: dict[str, Callable[[int, int, Generator], Tensor]] = {
    "uniform": lambda fan_in, n, rng: _uniform(fan_in**-0.5, n, rng),
    "normal": lambda fan_in, n, rng: torch.randn(n, generator=rng) * (3 * fan_in) ** -0.5,  # uniform's variance
    "kaiming": lambda fan_in, n, rng: _uniform((6 / fan_in) ** 0.5, n, rng),  # authors-nsfw
    "truncated": lambda fan_in, n, rng: _truncated(0.02, 2.0, n, rng),  # authors-cls
    "zeros": lambda fan_in, n, rng: torch.zeros(n),
    "ones": lambda fan_in, n, rng: torch.ones(n),
}
"""(fan_in, how many values, generator) -> the new values of a weight."""


@torch.no_grad()
def reinitialise_(
    params: dict[str, nn.Parameter], masks: dict[str, Tensor], init: str, seed: int, shards: Shards = REPLICATED
) -> dict[str, int]:
    """Give the masked entries of `params` new values in place; returns how many really changed, per parameter.

    `masks` are boolean, shaped like their parameters; masks of other parameters are ignored. Only masked entries are
    drawn, each parameter's from its own generator, so that one mask never changes another's draws; every shard draws
    those of all shards and takes its own. One-dimensional parameters (biases) become 0 whatever `init` says.
    Raises KeyError for an unknown init.
    """
    draw = INITS[init]
    chosen = torch.tensor([int(masks[name].sum()) for name in params], dtype=torch.int64)
    slices = zip(params.items(), shards.before(chosen).tolist(), shards.total(chosen).tolist(), strict=True)
    changed = []
    for (name, p), start, n in slices:
        mask = masks[name].to(p.device)
        old = p[mask]
        new = torch.zeros_like(old)
        if p.ndim > 1:
            values = draw(p.shape[1:].numel(), n, generator(seed, "trim", name))
            new = values[start : start + len(old)].to(old)
        p[mask] = new
        changed.append(int((new != old).sum()))
    return dict(zip(params, shards.total(torch.tensor(changed, dtype=torch.int64)).tolist(), strict=True))
