"""Projection of the repair gradient (Wu & Harandi 2024, Eq. 4-5) in closed form: no QP solver, nothing concatenated.

    min_g 1/2 |g - g_o|^2  subject to  <g, g_f> <= 0        so that no step lowers the forget loss
    g = g_o - v g_f,   v = max(0, <g_o, g_f> / |g_f|^2)

The paper prints the dual, Eq. 5, as a supremum; it is the minimum of a convex quadratic.
"""

from collections.abc import Iterator
from itertools import combinations

import torch
from torch import Tensor

from erase_sd.core.task import Params

CHUNK = 1 << 16  # entries that one sum on the CPU adds up: two such pieces fit its cache


@torch.no_grad()
def dot(a: Params, b: Params) -> Tensor:
    """Return <a, b> over all entries of equally named and shaped tensors, a float64 scalar on the CPU.

    Not one `torch.dot` per tensor: a CPU's kernel may add one product after the other, which in fp32 is 1e-3 off at
    3e7 entries, and in which order it adds differs between processors. Chunks are summed in float64 there: n 2^-53
    bounds the error in any order. A GPU adds in a tree, would wait for the launches of so many chunks, and has few
    float64 units.
    """
    return torch.stack([torch.dot(x, y) for x, y in _chunks(a, b)]).cpu().double().sum()


@torch.no_grad()
def products(a: Params, b: Params) -> Tensor:
    """Return <a, b>, <a, a> and <b, b> as `dot` does, in one pass over the memory: float64 (3,) on the CPU."""
    sums = [torch.stack([torch.dot(x, y), torch.dot(x, x), torch.dot(y, y)]) for x, y in _chunks(a, b)]
    return torch.stack(sums).cpu().double().sum(0)


def _chunks(a: Params, b: Params) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the entries of both in pieces of one dtype: float64 that fits a CPU's cache, fp32 or wider elsewhere."""
    for name, x in a.items():
        y, on_cpu = b[name], x.device.type == "cpu"
        size, least = (CHUNK, torch.float64) if on_cpu else (1 << 30, torch.float32)
        wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), least)
        for one, two in zip(x.reshape(-1).split(size), y.reshape(-1).split(size), strict=True):
            yield one.to(wide), two.to(wide)


def coefficient(dot_of: float, norm2_f: float, margin: float = 0.0, ridge: float = 0.0) -> float:
    """Return v of g = g_o - v g_f, from <g_o, g_f> and |g_f|^2; 0 where the constraint already holds or g_f = 0.

    Eq. 5 has margin = ridge = 0. The released code demands v >= 0.5 = margin and adds ridge = 1e-3 to |g_f|^2.
    """
    if dot_of <= 0 or norm2_f == 0:
        return 0.0
    return max(margin, dot_of / (norm2_f + ridge))


def collapsed(dot_rf: float, norm2_f: float, lam: float, margin: float = 0.0, ridge: float = 0.0) -> float:
    """Return c of g = g_r - c g_f when ascent and constraint share g_f, as in Algorithm 1, where g_o = g_r - lam g_f.

    With margin = ridge = 0 it is c = max(lam, <g_r, g_f> / |g_f|^2), and lam if g_f = 0.
    """
    return lam + coefficient(dot_rf - lam * norm2_f, norm2_f, margin, ridge)


@torch.no_grad()
def subtract_(g: Params, g_f: Params, c: float) -> None:
    """Set g <- g - c g_f, in place."""
    for name, x in g.items():
        x.sub_(g_f[name], alpha=c)


def dual(A: Tensor, b: Tensor) -> Tensor:
    """Solve Eq. 5 for m constraints: return the v (m,) >= 0 that minimises 1/2 v'Av + b'v; g = g_o - sum_i v_i g_i.

    A (m, m) holds <g_i, g_j> and b (m,) holds -<g_o, g_i>. Exact: some minimum is stationary on its support, and all
    2^m supports are tried, which suits the handful of memory gradients this is for. Returns float64.
    """
    A, b = A.double(), b.double()
    best, least = torch.zeros_like(b), 0.0
    for size in range(1, len(b) + 1):
        for support in map(list, combinations(range(len(b)), size)):
            v = torch.zeros_like(b)
            v[support] = -torch.linalg.pinv(A[support][:, support], hermitian=True) @ b[support]
            value = float(0.5 * v @ A @ v + b @ v)
            if (v >= 0).all() and value < least:
                best, least = v, value
    return best
