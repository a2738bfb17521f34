"""Parameters divided among ranks, which are threads here: everything equals the undivided result."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from erase_sd.common.rng import generator
from erase_sd.core.sensitivity import chance, contrastive, entries, threshold, top_k
from erase_sd.core.task import taken
from erase_sd.core.trim import INITS, reinitialise_

SHAPES = {"conv": (7, 3, 3, 3), "one row": (1, 40), "bias": (5,), "wide": (2, 6), "empty": (0, 4)}


class Rank:
    """One of several threads that exchange tensors as ranks do."""

    def __init__(self, rank: int, slots: list, barrier: Barrier) -> None:
        self.rank, self.slots, self.barrier = rank, slots, barrier
        self.model, self.shards = nn.Module(), self  # a task as far as `taken` asks

    def _all(self, x: Tensor) -> list[Tensor]:
        self.slots[self.rank] = x.clone()
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._all(x)).sum(0)

    def exclusive_scan(self, x: Tensor) -> Tensor:
        return torch.stack([torch.zeros_like(x), *self._all(x)[: self.rank]]).sum(0)


def on(ranks: int, work: Callable[[Rank], Any]) -> list:
    """What `work` returns, or the exception it raises, on each rank."""
    slots, barrier = [None] * ranks, Barrier(ranks, timeout=20)
    with ThreadPoolExecutor(ranks) as pool:
        done = [pool.submit(work, Rank(r, slots, barrier)) for r in range(ranks)]
    return [f.exception() or f.result() for f in done]


def shard(x: Tensor, rank: int, ranks: int) -> Tensor:
    """FSDP2's division: chunks of the first dimension, the last ones short or empty."""
    rows = -(-len(x) // ranks)
    return x[rank * rows : (rank + 1) * rows]


def cut(tensors: dict[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    return {name: shard(x, rank, ranks).clone() for name, x in tensors.items()}


def joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def draws(kind: str) -> dict[str, Tensor]:
    rng = generator(0, "shards", kind)
    make = {
        "distinct": lambda shape: torch.randn(shape, generator=rng),
        "ties": lambda shape: torch.randint(-1, 3, shape, generator=rng).float(),
        "all equal": lambda shape: torch.ones(shape),
    }[kind]
    return {name: make(shape) for name, shape in SHAPES.items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("kind", ["distinct", "ties", "all equal"])
@pytest.mark.parametrize("strict", [False, True])
def test_top_k_on_shards_selects_what_the_whole_selects(kind, ranks, strict):
    scores = draws(kind)
    n = entries(scores)
    for k in (0, 1, 17, 60, 63, 64, 150, 190, 206, 211, n - 1, n):
        work = lambda r: (top_k(cut(scores, r.rank, ranks), k, strict, r), threshold(cut(scores, r.rank, ranks), k, r))  # noqa: E731, B023
        masks, thresholds = zip(*on(ranks, work), strict=True)
        whole = top_k(scores, k, strict)
        same(joined(masks), whole)
        assert strict or sum(int(m.sum()) for m in whole.values()) == k
        assert set(thresholds) == {threshold(scores, k)}


def test_ties_enter_by_parameter_and_index_whichever_shard_holds_them():
    scores = {"a": torch.tensor([1.0, 0.0, 1.0, 1.0]), "b": torch.tensor([1.0, 2.0])}
    found = joined(on(2, lambda r: top_k(cut(scores, r.rank, 2), 3, shards=r)))  # one tie left of each of two shards
    assert found["a"].tolist() == [True, False, True, False] and found["b"].tolist() == [False, True]


def test_a_score_that_is_not_finite_is_an_error_on_every_rank():
    scores = draws("distinct")
    scores["wide"][1, 3] = torch.nan
    for error in on(2, lambda r: top_k(cut(scores, r.rank, 2), 5, shards=r)):
        assert isinstance(error, FloatingPointError) and "a score of wide" in str(error)


def test_a_gradient_that_is_not_finite_is_an_error_on_every_rank():
    def work(r: Rank) -> None:
        p = nn.Parameter(torch.ones(2))
        p.grad = torch.full((2,), torch.inf if r.rank == 1 else 0.0)
        taken(r, {"fine": nn.Parameter(torch.ones(1)), "lost": p})

    for error in on(2, work):
        assert isinstance(error, FloatingPointError) and "the gradient of lost" in str(error)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("init", INITS)
def test_re_initialising_shards_gives_the_weights_of_the_whole(init, ranks):
    weights = draws("distinct")
    masks = top_k({name: x.abs() for name, x in weights.items()}, 100)

    def work(r: Rank) -> tuple[dict[str, nn.Parameter], dict[str, int]]:
        params = {name: nn.Parameter(x) for name, x in cut(weights, r.rank, ranks).items()}
        return params, reinitialise_(params, cut(masks, r.rank, ranks), init, 3, r)

    shards, counts = zip(*on(ranks, work), strict=True)
    whole = {name: nn.Parameter(x.clone()) for name, x in weights.items()}
    changed = reinitialise_(whole, masks, init, 3)
    same(joined(shards), whole)
    assert all(count == changed for count in counts) and sum(changed.values()) > 90


def test_contrast_and_chance_on_shards_are_those_of_the_whole():
    theta, g, fisher = draws("distinct"), draws("ties"), {n: x.square() for n, x in draws("ties").items()}

    def work(r: Rank) -> tuple[dict, dict]:
        mine = lambda x: cut(x, r.rank, 3)  # noqa: E731
        return contrastive(mine(theta), mine(g), mine(fisher), mine(fisher), 0.1, r), chance(mine(theta), 5, r)

    contrasts, chances = zip(*on(3, work), strict=True)
    same(joined(chances), chance(theta, 5))
    for name, x in contrastive(theta, g, fisher, fisher, 0.1).items():
        torch.testing.assert_close(joined(contrasts)[name], x)
