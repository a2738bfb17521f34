"""The closed form of the projection against a quadratic-programming solver that knows nothing of it."""

import numpy as np
import pytest
import quadprog
import torch
from torch import Tensor

from erase_sd.common.rng import generator
from erase_sd.core.projection import coefficient, collapsed, dot, dual, subtract_


def problem(case: int, m: int = 1) -> tuple[Tensor, Tensor]:
    """g_o (n,) and m memories (m, n), float64, of many sizes and scales."""
    rng = generator(0, "quadprog", m, case)
    n = int(torch.randint(2, 40, (1,), generator=rng))
    scale = 10 ** (4 * torch.rand(2, generator=rng, dtype=torch.float64) - 2)
    g = torch.randn(m + 1, n, generator=rng, dtype=torch.float64)
    return scale[0] * g[0], scale[1] * g[1:]


def primal(g_o: Tensor, memories: Tensor) -> Tensor:
    """argmin 1/2 |g - g_o|^2 subject to <g, g_i> <= 0: the problem itself, not its dual."""
    n = len(g_o)
    unit = memories / memories.norm(dim=1, keepdim=True)  # the same half-spaces, for a solver with absolute tolerances
    solution = quadprog.solve_qp(np.eye(n), g_o.numpy(), -unit.T.numpy(), np.zeros(len(memories)))[0]
    return torch.from_numpy(solution)


@pytest.mark.parametrize("lam", [0.0, 0.3])
def test_the_projection_is_the_solution_of_the_quadratic_program(lam: float):
    acted = 0
    for case in range(200):
        g_r, (g_f,) = problem(case)
        expected = primal(g_r - lam * g_f, g_f[None])
        g, memory = {"w": g_r.clone()}, {"w": g_f}
        c = collapsed(float(dot(g, memory)), float(dot(memory, memory)), lam)
        subtract_(g, memory, c)
        assert (g["w"] - expected).norm() <= 1e-9 * max(1.0, float(g_r.norm()))
        acted += c > lam
    assert 10 < acted < 190


def test_margin_and_ridge_are_the_released_quadratic_program():
    """GEM's project2cone2 with v >= 0.5 and 1e-3 on the diagonal, whenever <g_o, g_f> > 0."""
    for case in range(200):
        g_o, (g_f,) = problem(case)
        if g_o @ g_f <= 0:
            assert coefficient(float(g_o @ g_f), float(g_f @ g_f), 0.5, 1e-3) == 0.0
            continue
        P, q = np.array([[float(g_f @ g_f) + 1e-3]]), np.array([float(g_o @ g_f)])
        v = quadprog.solve_qp(P, q, np.eye(1), np.full(1, 0.5))[0][0]
        assert coefficient(float(g_o @ g_f), float(g_f @ g_f), 0.5, 1e-3) == pytest.approx(v, rel=1e-9)


@pytest.mark.parametrize("m", [2, 3, 5])
def test_several_memories(m: int):
    for case in range(60):
        g_o, memories = problem(case, m)
        if len(g_o) < m:
            continue  # dependent constraints, which the solver refuses
        found = g_o - dual(memories @ memories.T, -memories @ g_o) @ memories
        assert (found - primal(g_o, memories)).norm() <= 1e-9 * max(1.0, float(g_o.norm()))
