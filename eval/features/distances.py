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
    n: int | None  # None where a published file does not say


def statistics(x: Tensor) -> Statistics:
    """Return mean and covariance, divided by N - 1, of features (N, D). Raises UserError for fewer than 2 of them."""
    if len(x) < 2:
        raise UserError(f"{len(x)} image gives no covariance: a distance needs 2 or more images on either side")
    x = x.double()
    mean = x.mean(0)
    centred = x - mean
    return Statistics(mean, centred.T @ centred / (len(x) - 1), len(x))


def frechet(a: Statistics, b: Statistics) -> float:
    """Return the squared Fréchet distance of two normal distributions (Heusel et al., arXiv:1706.08500).

    |μ_a - μ_b|² + tr(Σ_a + Σ_b - 2 (Σ_a Σ_b)^½).

    The trace of the square root is the sum of the singular values of Σ_a^½ Σ_b^½: no complex numbers and no added
    epsilon, also where there are fewer images than features. Raises UserError for different widths.
    """
    _same_width(a.mean, b.mean)
    cross = torch.linalg.svdvals(_root(a.covariance).T @ _root(b.covariance)).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(0.0, distance.item())  # rounding alone can make it negative


def _root(covariance: Tensor) -> Tensor:
    """Return (D, r) with R Rᵀ = Σ; r is the rank, so that a covariance of few images makes a small problem."""
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


def kernel_distance(x: Tensor, y: Tensor, seed: int = 0, subsets: int = SUBSETS, size: int = SUBSET_SIZE) -> Tensor:
    """Return unbiased MMD² with the kernel (x·y / D + 1)³ (Bińkowski et al., arXiv:1801.01401), one for every subset.

    A subset is `size` images of either side, drawn without replacement by keyed generators. Where there are no more
    on both sides, every subset would be the same: there is one value, of all images. It may be negative.
    Raises UserError for different widths, or fewer than 2 images.
    """
    size = _fitting(x, y, size)
    if len(x) == len(y) == size:
        return _polynomial(x.double(), y.double())[None]
    values = []
    for index in range(subsets):
        of_x = _draw(len(x), size, seed, 0, index)
        of_y = _draw(len(y), size, seed, 1, index)
        values.append(_polynomial(x[of_x].double(), y[of_y].double()))
    return torch.stack(values)


def _fitting(x: Tensor, y: Tensor, size: int) -> int:
    """Return the size of a subset that both sides have images for."""
    _same_width(x[0], y[0])
    least = min(len(x), len(y))
    if least < 2:
        raise UserError(f"{least} image gives no kernel distance: give 2 or more images on either side")
    return min(size, least)


def _draw(n: int, size: int, seed: int, side: int, index: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, "kid", index, side))[:size]


def _polynomial(x: Tensor, y: Tensor) -> Tensor:
    """Return unbiased MMD² of as many x as y: the diagonals, an image against itself, are left out."""
    m = len(x)
    within = _off_diagonal(_kernel(x, x)) + _off_diagonal(_kernel(y, y))
    return within / (m * (m - 1)) - 2 * _kernel(x, y).mean()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """Return the polynomial kernel of every pair, (len(x), len(y))."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def _off_diagonal(k: Tensor) -> Tensor:
    return k.sum() - k.diagonal().sum()


def cmmd(x: Tensor, y: Tensor) -> float:
    """Return CMMD (Jayasumana et al., arXiv:2401.09603): 1000 x MMD² of normalised features.

    The kernel is exp(-|x - y|² / 2σ²) with σ = 10.
    The biased estimator, diagonals included, as in the authors' code (google-research/cmmd/distance.py), so that it
    is never negative and 0 for identical sets. Raises UserError for different widths.
    """
    _same_width(x[0], y[0])
    x = F.normalize(x.double(), dim=1)
    y = F.normalize(y.double(), dim=1)
    return max(0.0, SCALE * (_gaussian(x, x) + _gaussian(y, y) - 2 * _gaussian(x, y)))


def _gaussian(x: Tensor, y: Tensor) -> float:
    """Return the mean of the kernel over all pairs of unit vectors, where |x - y|² = 2 - 2 x·y; block by block."""
    total = 0.0
    for start in range(0, len(x), BLOCK):
        total += ((x[start : start + BLOCK] @ y.T - 1) / SIGMA**2).exp().sum().item()
    return total / (len(x) * len(y))


def cosines(x: Tensor, y: Tensor) -> Tensor:
    """Return (N,) cosines in [-1, 1], of row i with row i. Raises UserError for different widths."""
    _same_width(x[0], y[0])
    return F.cosine_similarity(x.double(), y.double(), dim=1)


def _same_width(x: Tensor, y: Tensor) -> None:
    if len(x) != len(y):
        raise UserError(f"features of {len(x)} and of {len(y)} numbers cannot be compared: use the same --features")
