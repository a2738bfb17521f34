"""Distances between two sets of feature vectors, as pure functions: Fréchet, kernel and CLIP-MMD distance, cosines.

    frechet(statistics(x), statistics(y))          FID when the features are InceptionV3's
    kernel_distance(x, y, seed=0)                  KID, one value for every subset
    cmmd(x, y)                                     CMMD when the features are CLIP's

Features are (N, D), finite, on the CPU; everything is computed in float64 and without units, except where it says so.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from erase_sd.common.errors import UserError
from erase_sd.common.rng import generator

SUBSETS, SUBSET_SIZE = 100, 1000  # of KID, as in torch-fidelity and torchmetrics
SIGMA, SCALE = 10.0, 1000.0  # of CMMD
BLOCK = 1024  # rows of a kernel matrix that are in memory at a time


class Statistics(NamedTuple):
    """The normal distribution fitted to n features: mean (D,), covariance (D, D), float64."""

    mean: Tensor
    covariance: Tensor
    n: int


def statistics(x: Tensor) -> Statistics:
    """Mean and covariance, divided by N - 1, of features (N, D). Raises UserError for fewer than 2 of them."""
    if len(x) < 2:
        raise UserError(f"{len(x)} image gives no covariance: a distance needs 2 or more images on either side")
    x = x.double()
    mean = x.mean(0)
    centred = x - mean
    return Statistics(mean, centred.T @ centred / (len(x) - 1), len(x))


def frechet(a: Statistics, b: Statistics) -> float:
    """|μ_a - μ_b|² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½), the squared Fréchet distance (Heusel et al., arXiv:1706.08500).

    The trace of the square root is the sum of the singular values of Σ_a^½ Σ_b^½: no complex numbers and no added
    epsilon, also where there are fewer images than features. Raises UserError for different widths.
    """
    _same_width(a.mean, b.mean)
    cross = torch.linalg.svdvals(_root(a.covariance).T @ _root(b.covariance)).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(0.0, distance.item())  # rounding alone can make it negative


def _root(covariance: Tensor) -> Tensor:
    """(D, r) with R Rᵀ = Σ; r is the rank, so that a covariance of few images makes a small problem."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


def kernel_distance(x: Tensor, y: Tensor, seed: int = 0, subsets: int = SUBSETS, size: int = SUBSET_SIZE) -> Tensor:
    """Unbiased MMD² with the kernel (x·y / D + 1)³ (Bińkowski et al., arXiv:1801.01401), one for every subset.

    A subset is `size` images of either side, drawn without replacement by keyed generators. Where there are no more
    on both sides, every subset would be the same: there is one value, of all images. It may be negative.
    Raises UserError for different widths, or fewer than 2 images.
    """
    size = _fitting(x, y, size)
    if len(x) == len(y) == size:
        return _polynomial(x.double(), y.double())[None]
    draws = [[_draw(len(z), size, seed, side, i) for side, z in enumerate((x, y))] for i in range(subsets)]
    return torch.stack([_polynomial(x[i].double(), y[j].double()) for i, j in draws])


def _fitting(x: Tensor, y: Tensor, size: int) -> int:
    """The size of a subset that both sides can fill."""
    _same_width(x[0], y[0])
    if (least := min(len(x), len(y))) < 2:
        raise UserError(f"{least} image gives no kernel distance: give 2 or more images on either side")
    return min(size, least)


def _draw(n: int, size: int, seed: int, side: int, index: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, "kid", index, side))[:size]


def _polynomial(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased MMD² of as many x as y: the diagonals, an image against itself, are left out."""
    m, d = x.shape
    k_xx, k_yy, k_xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    same = sum(k.sum() - k.diagonal().sum() for k in (k_xx, k_yy)) / (m * (m - 1))
    return same - 2 * k_xy.mean()


def cmmd(x: Tensor, y: Tensor) -> float:
    """1000 x MMD² with exp(-|x - y|² / 2σ²), σ = 10, on normalised features (Jayasumana et al., arXiv:2401.09603).

    The biased estimator, diagonals included, as in the authors' code (google-research/cmmd/distance.py), so that it
    is never negative and 0 for identical sets. Raises UserError for different widths.
    """
    _same_width(x[0], y[0])
    x, y = (F.normalize(z.double(), dim=1) for z in (x, y))
    return max(0.0, SCALE * (_gaussian(x, x) + _gaussian(y, y) - 2 * _gaussian(x, y)))


def _gaussian(x: Tensor, y: Tensor) -> float:
    """The mean of the kernel over all pairs of unit vectors, where |x - y|² = 2 - 2 x·y; block by block."""
    total = sum(((x[i : i + BLOCK] @ y.T - 1) / SIGMA**2).exp().sum().item() for i in range(0, len(x), BLOCK))
    return total / (len(x) * len(y))


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """(N,) cosines in [-1, 1] of row i of one with row i of the other. Raises UserError for different widths."""
    _same_width(x[0], y[0])
    return F.cosine_similarity(x.double(), y.double(), dim=1)


def _same_width(x: Tensor, y: Tensor) -> None:
    if len(x) != len(y):
        raise UserError(f"features of {len(x)} and of {len(y)} numbers cannot be compared: use the same --features")
