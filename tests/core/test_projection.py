"""The closed form against its optimisation problem: feasibility, optimality, brute force."""

import math

import pytest
import torch

from erase_sd.common.rng import generator
from erase_sd.core.projection import coefficient, collapsed, dot, dual, products, subtract_

SHAPES = {"a": (3, 4), "b": (17,), "c": (2, 3, 5), "d": ()}


def vectors(case, dtype=torch.float32, count=2):
    rng = generator(0, "vectors", case)
    scales = [10.0 ** torch.randint(-4, 3, (), generator=rng).item() for _ in range(count)]
    return [{n: scale * torch.randn(s, generator=rng, dtype=dtype) for n, s in SHAPES.items()} for scale in scales]


def flat(g):
    return torch.cat([x.reshape(-1).double() for x in g.values()])


def projected(g_o, g_f, **options):
    g = {name: x.clone() for name, x in g_o.items()}
    subtract_(g, g_f, coefficient(dot(g_o, g_f).item(), dot(g_f, g_f).item(), **options))
    return g


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_no_step_lowers_the_forget_loss(dtype, tolerance):
    for case in range(200):
        g_o, g_f = vectors(case, dtype)
        g, f = flat(projected(g_o, g_f)), flat(g_f)
        # rounding is relative to what was subtracted, so to g_o
        assert g @ f <= tolerance * flat(g_o).norm() * f.norm()


def test_a_gradient_that_already_agrees_is_left_alone():
    touched = 0
    for case in range(50):
        g_o, g_f = vectors(case)
        g = projected(g_o, g_f)
        same = torch.equal(flat(g), flat(g_o))
        assert same == (dot(g_o, g_f) <= 0)
        touched += not same
    assert 10 < touched < 40


def test_the_projection_is_the_nearest_feasible_gradient():
    for case in range(20):
        g_o, g_f = vectors(case, torch.float64)
        g, o, f, rng = flat(projected(g_o, g_f)), flat(g_o), flat(g_f), generator(1, "near", case)
        for _ in range(200):
            other = g + 0.1 * o.norm() * torch.randn(len(g), generator=rng, dtype=torch.float64)
            other -= max(0.0, float(other @ f) / float(f @ f)) * f  # any feasible point
            assert (g - o).norm() <= (other - o).norm() + 1e-12 * o.norm()


@pytest.mark.parametrize("lam", [0.0, 0.05, 0.5, 3.0])
def test_one_coefficient_does_ascent_and_projection_together(lam):
    for case in range(50):
        g_r, g_f = vectors(case, torch.float64)
        dot_rf, norm2_f = dot(g_r, g_f).item(), dot(g_f, g_f).item()
        c = collapsed(dot_rf, norm2_f, lam)
        assert c == pytest.approx(max(lam, dot_rf / norm2_f), rel=1e-14)
        g = {name: x.clone() for name, x in g_r.items()}
        subtract_(g, g_f, c)
        two_steps = projected({name: g_r[name] - lam * g_f[name] for name in g_r}, g_f)
        torch.testing.assert_close(flat(g), flat(two_steps), rtol=1e-9, atol=1e-12 * float(flat(g_r).norm()))


def test_without_a_forget_gradient_nothing_is_projected():
    assert coefficient(0.0, 0.0) == 0.0
    assert coefficient(0.0, 0.0, margin=0.5) == 0.0
    assert collapsed(0.0, 0.0, 0.3) == 0.3


def test_margin_and_ridge_follow_the_released_code():
    assert coefficient(0.2, 1.0, margin=0.5) == 0.5  # at least the margin once triggered
    assert coefficient(-0.2, 1.0, margin=0.5) == 0.0
    assert coefficient(2.0, 1.0, margin=0.5, ridge=1e-3) == pytest.approx(2 / 1.001)


def test_margin_and_ridge_solve_the_released_qp():
    """min over v >= margin of 1/2 (|g_f|^2 + ridge) v^2 - <g_o, g_f> v, on a grid."""
    grid = torch.linspace(0.5, 5, 450_001, dtype=torch.float64)
    for dot_of, norm2_f in ((0.2, 1.0), (3.0, 0.9), (0.7, 1.4)):
        best = grid[(0.5 * (norm2_f + 1e-3) * grid**2 - dot_of * grid).argmin()].item()
        assert coefficient(dot_of, norm2_f, 0.5, 1e-3) == pytest.approx(best, abs=2e-5)


def test_dot_of_a_large_tensor_keeps_its_digits():
    """The bound is that of n positive products added in float64 in any order, n 2^-53: no processor exceeds it."""
    n = 2_000_000
    x = torch.randn(n, generator=generator(0, "large"))
    exact = math.fsum(x.double().square().tolist())
    found = dot({"w": x}, {"w": x})
    assert found.item() == pytest.approx(exact, rel=n * 2.0**-53)
    assert found.dtype == torch.float64


def test_dual_with_one_memory_is_the_closed_form():
    for dot_of, norm2_f in ((2.0, 0.5), (-1.0, 0.5), (0.0, 1.0), (1.0, 1e-6)):
        v = dual(torch.tensor([[norm2_f]]), torch.tensor([-dot_of]))
        assert v.item() == pytest.approx(coefficient(dot_of, norm2_f), rel=1e-6)


@pytest.mark.parametrize("m", [1, 2, 3, 5])
def test_dual_satisfies_the_optimality_conditions(m):
    for case in range(30):
        rng = generator(0, "dual", m, case)
        G = torch.randn(m, 4, generator=rng, dtype=torch.float64)  # m = 5: linearly dependent on purpose
        g_o = torch.randn(4, generator=rng, dtype=torch.float64)
        v = dual(G @ G.T, -G @ g_o)
        slack = G @ (g_o - v @ G)  # <g_i, g>: <= 0, and 0 where v_i > 0
        assert (v >= 0).all()
        assert (slack <= 1e-9).all()
        assert abs(float(v @ slack)) < 1e-9


@pytest.mark.parametrize("m", [2, 3])
def test_dual_equals_projected_descent_from_many_iterations(m):
    for case in range(10):
        G, g_o = vectors_matrix(m, case)
        A, b = G @ G.T, -G @ g_o
        v = torch.zeros(m, dtype=torch.float64)
        for _ in range(5000):
            v = (v - (A @ v + b) / torch.linalg.matrix_norm(A, 2)).clamp(min=0)
        torch.testing.assert_close(dual(A, b), v, rtol=1e-5, atol=1e-7)


def vectors_matrix(m, case):
    rng = generator(0, "matrix", m, case)
    return torch.randn(m, 9, generator=rng, dtype=torch.float64), torch.randn(9, generator=rng, dtype=torch.float64)


def test_dual_equals_a_grid_over_the_feasible_set():
    G, g_o = vectors_matrix(2, 99)
    g_o = g_o + 2 * G.sum(0)  # both constraints violated
    A, b = G @ G.T, -G @ g_o
    axis = torch.linspace(0, 6, 1201, dtype=torch.float64)
    v = torch.cartesian_prod(axis, axis)
    value = 0.5 * ((v @ A) * v).sum(1) + v @ b
    best = dual(A, b)
    assert float(0.5 * best @ A @ best + b @ best) <= float(value.min()) + 1e-12
    assert (best - v[value.argmin()]).abs().max() < 0.02


def test_dual_survives_equal_and_vanishing_memories():
    g, zero = torch.tensor([1.0, 2.0, -1.0]), torch.zeros(3)
    G, g_o = torch.stack([g, g, zero]), torch.tensor([3.0, 1.0, 0.0])
    left = g_o - dual(G @ G.T, -G @ g_o).float() @ G
    assert (G @ left).abs().max() < 1e-5
    assert math.isfinite(left.sum())


def test_products_are_the_three_dots():
    rng = generator(0, "products")
    a, b = ({n: torch.randn(s, generator=rng) for n, s in (("w", (300, 700)), ("b", (5,)))} for _ in range(2))
    assert products(a, b).tolist() == [float(dot(a, b)), float(dot(a, a)), float(dot(b, b))]
