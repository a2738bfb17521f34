"""The exact global top-k against sorting."""

import math

import pytest
import torch

from erase_sd.common.rng import generator
from erase_sd.core.sensitivity import threshold, top_k


def by_sorting(scores, k):
    """Oracle: a stable sort of (score descending, position), by concatenation."""
    flat = torch.cat([s.reshape(-1) for s in scores.values()])
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[torch.sort(flat, descending=True, stable=True).indices[:k]] = True
    parts = chosen.split([s.numel() for s in scores.values()])
    return {name: part.view(s.shape) for (name, s), part in zip(scores.items(), parts, strict=True)}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def draws(kind):
    rng = generator(0, "scores", kind)
    sizes = [(3, 4, 5), (70_001,), (2, 2), (0,), (), (11, 13)]
    make = {
        "signed": lambda shape: torch.randn(shape, generator=rng),
        "positive": lambda shape: torch.randn(shape, generator=rng).abs(),
        "ties": lambda shape: torch.randint(-3, 4, shape, generator=rng).float(),
        "zeros": lambda shape: (
            torch.randn(shape, generator=rng).clamp(min=0) * torch.randint(-1, 2, shape, generator=rng)
        ),
        "denormal": lambda shape: torch.randint(-9, 10, shape, generator=rng) * 1e-45,
        "wide": lambda shape: torch.randn(shape, generator=rng) * 10.0 ** torch.randint(-44, 37, shape, generator=rng),
        "close": lambda shape: 1 + torch.randint(0, 50, shape, generator=rng) * 2.0**-23,
    }[kind]
    return {str(i): make(shape) for i, shape in enumerate(sizes)}


@pytest.mark.parametrize("kind", ["signed", "positive", "ties", "zeros", "denormal", "wide", "close"])
def test_top_k_equals_sorting(kind):
    scores = draws(kind)
    total = sum(s.numel() for s in scores.values())
    for k in (0, 1, 2, 63, total // 200, total // 2, total - 1, total):
        assert_same(top_k(scores, k), by_sorting(scores, k))


def test_top_k_treats_negative_zero_as_zero():
    scores = {"a": torch.tensor([-0.0, -1.0, 0.0]), "b": torch.tensor([-0.0, 0.0, -1e-45])}
    for k in range(7):
        assert_same(top_k(scores, k), by_sorting(scores, k))


def test_top_k_of_one_giant_tensor():
    scores = {"a": torch.randn(5_000_000, generator=generator(0, "giant"))}
    assert_same(top_k(scores, 12_345), by_sorting(scores, 12_345))


def test_top_k_of_thousands_of_tiny_tensors():
    flat = torch.randn(3000, generator=generator(0, "tiny"))
    scores = {str(i): x for i, x in enumerate(flat.round(decimals=2).split(2))}
    assert_same(top_k(scores, 777), by_sorting(scores, 777))


def test_top_k_breaks_ties_by_logical_index_whatever_the_memory_layout():
    s = torch.randint(0, 3, (2, 3, 4, 5), generator=generator(0, "layout")).float()
    assert_same(top_k({"w": s.to(memory_format=torch.channels_last)}, 50), top_k({"w": s}, 50))


def test_threshold_is_the_kth_largest():
    scores = draws("signed")
    ordered = torch.cat([s.reshape(-1) for s in scores.values()]).sort(descending=True).values
    for k in (1, 500, len(ordered)):
        assert threshold(scores, k) == (ordered[k - 1].item(), 1)
    assert threshold({"w": torch.tensor([5.0, 2.0, 2.0, 2.0])}, 3) == (2.0, 2)


def test_strict_follows_the_released_code_and_drops_ties():
    rng = generator(0, "strict")
    distinct, tied = torch.randperm(100, generator=rng).float(), torch.tensor([3.0, 2.0, 2.0, 2.0, 1.0])
    for s, sparsity in ((distinct, 0.9), (distinct, 0.0), (distinct, 1.0), (tied, 0.6), (tied, 0.2)):
        kept = int(sparsity * len(s))
        tau = s.sort().values[kept - 1] if kept else -math.inf
        assert torch.equal(top_k({"w": s}, len(s) - kept, strict=True)["w"], s > tau)


@pytest.mark.parametrize("k", [-1, 4])
def test_top_k_refuses_more_than_there_is(k):
    with pytest.raises(ValueError, match="of 3 scores"):
        top_k({"w": torch.ones(3)}, k)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_top_k_refuses_scores_that_are_not_finite(bad):
    with pytest.raises(FloatingPointError, match="layer.weight"):
        top_k({"ok": torch.ones(3), "layer.weight": torch.tensor([1.0, bad])}, 2)


@pytest.mark.parametrize("shape", [(7, 40_000), (40_000, 7), (300, 30, 3, 3)])
def test_top_k_of_a_transposed_tensor_larger_than_a_chunk(shape):
    s = torch.randint(0, 900, shape, generator=generator(0, "transposed", *shape)).float()
    assert_same(top_k({"w": s.transpose(0, 1)}, 1234), by_sorting({"w": s.transpose(0, 1)}, 1234))
