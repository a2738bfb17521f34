"""UnlearnDiffAtk: the simplex against a quadratic program, gradients against finite differences."""

from collections.abc import Callable

import numpy as np
import pytest
import quadprog
import torch

from erase_sd.common.rng import generator
from eval.attacks import attack
from eval.attacks.soft_prompt import Vocabulary
from eval.attacks.unlearndiffatk import SampledTokens, denoising_loss, projected, visited
from tests.conftest import tiny_pipeline
from tests.eval.attacks.conftest import NEVER, TARGETS


def by_quadratic_program(row: np.ndarray) -> np.ndarray:
    """min |x - row|^2 / 2 with sum x = 1 and x >= 0."""
    n = len(row)
    constraints = np.concatenate([np.ones((n, 1)), np.eye(n)], axis=1)
    return quadprog.solve_qp(np.eye(n), row, constraints, np.array([1.0] + [0.0] * n), meq=1)[0]


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_the_projection_is_the_nearest_point_of_the_simplex(scale: float):
    p = scale * torch.randn(20, 7, dtype=torch.float64, generator=generator(0, "rows"))
    for row, wanted in zip(projected(p), p, strict=True):
        np.testing.assert_allclose(row.numpy(), by_quadratic_program(wanted.numpy()), atol=1e-7)


def test_what_is_on_the_simplex_stays_there():
    p = torch.rand(5, 9, dtype=torch.float64).softmax(1)
    torch.testing.assert_close(projected(p), p)


def test_sampling_passes_the_gradient_straight_through_and_clamps_it():
    p = torch.full((2, 3), 1 / 3, requires_grad=True)
    one_hot = SampledTokens.apply(p, torch.tensor([2, 0]))
    assert one_hot.tolist() == [[0, 0, 1], [1, 0, 0]]
    (one_hot * torch.tensor([[0.5, -7.0, 2.0], [0.1, 0.2, -0.3]])).sum().backward()
    torch.testing.assert_close(p.grad, torch.tensor([[0.5, -1.0, 1.0], [0.1, 0.2, -0.3]]))


def test_fifty_timesteps_are_the_released_ones():
    assert visited(50) == list(range(10, 1000, 20))


def test_the_gradient_of_the_objective_is_that_of_finite_differences(make_setup: Callable):
    setup = make_setup(tiny_pipeline().to(torch.float64))
    words, z = Vocabulary(setup.pipe), setup.reference(TARGETS[:1]).double()
    vectors = words.table[[10, 20, 30]].double().requires_grad_(True)

    def loss(v: torch.Tensor) -> torch.Tensor:
        return denoising_loss(setup, words, v[None], z, 300, generator(0, "noise"))

    loss(vectors).backward()
    h = 1e-5
    for i, j in ((0, 0), (1, 5), (2, 31)):
        step = torch.zeros_like(vectors)
        step[i, j] = h
        with torch.no_grad():
            slope = (loss(vectors + step) - loss(vectors - step)) / (2 * h)
        torch.testing.assert_close(vectors.grad[i, j], slope, rtol=1e-4, atol=1e-9)


def test_the_search_lowers_its_own_loss(make_setup: Callable):
    """The prefix that it ends with denoises the picture better than most random ones."""
    setup = make_setup(judge=NEVER)
    for p in setup.pipe.text_encoder.parameters():
        p.data *= 3  # tokens of a toy text encoder hardly differ
    search = attack("unlearndiffatk", given={"tokens": 3, "timesteps": 2, "iterations": 15, "samples": 4})
    found = search.attempt(setup, search.prepare(setup), TARGETS[:1])[0].found["tokens"]
    words, z = Vocabulary(setup.pipe), setup.reference(TARGETS[:1]).expand(8, -1, -1, -1)
    rest = words.ids(TARGETS[0].prompt, 70)

    @torch.no_grad()
    def loss(tokens: list[int]) -> float:
        vectors = words.table[tokens + rest].expand(8, -1, -1)
        return float(denoising_loss(setup, words, vectors, z, 750, generator(1, "judged")))

    rng = np.random.default_rng(0)
    random = [loss(rng.integers(0, len(words.table), 3).tolist()) for _ in range(20)]
    assert loss(found) < np.median(random)


def test_a_target_that_resists_costs_the_whole_budget(make_setup: Callable):
    setup = make_setup(judge=NEVER)
    search = attack("unlearndiffatk", given={"tokens": 2, "timesteps": 3, "iterations": 2, "samples": 2})
    finding = search.attempt(setup, search.prepare(setup), TARGETS[:1])[0]
    assert not finding.success
    assert finding.image is None
    assert finding.queries == 3
    assert finding.gradient_steps == 12
