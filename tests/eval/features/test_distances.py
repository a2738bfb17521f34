"""Distances against torchmetrics' own, fed with features as they are, and against closed forms."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from erase_sd.common.errors import UserError
from eval.features import distances
from eval.features.distances import Statistics, cmmd, cosines, frechet, kernel_distance, statistics

WIDTH = 12


class Flat(nn.Module):
    """An 'image' (N, 3, 2, 2) is its own feature (N, 12)."""

    num_features = WIDTH

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).double()


def draw(n: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    """Correlated features (n, 12) in float32."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(7))
    return torch.randn(n, WIDTH, generator=rng) @ mix * scale + shift


def metric_of(cls: type, x: Tensor, y: Tensor, **options):
    metric = cls(feature=Flat(), normalize=False, **options)
    metric = metric.set_dtype(torch.float64)
    for features, real in ((x, True), (y, False)):
        metric.update(features.double().unflatten(1, (3, 2, 2)), real=real)
    return metric.compute()


@pytest.mark.parametrize(("n", "m", "shift", "scale"), [(80, 80, 0.3, 1.0), (200, 60, 1.0, 0.5), (40, 90, 0.0, 2.0)])
def test_frechet_is_torchmetrics(n: int, m: int, shift: float, scale: float):
    x, y = draw(n, 0), draw(m, 1, shift, scale)
    theirs = metric_of(FrechetInceptionDistance, x, y).item()
    assert frechet(statistics(x), statistics(y)) == pytest.approx(theirs, rel=1e-4)


def test_frechet_of_fewer_images_than_features_is_scipys():
    x, y = draw(7, 0), draw(9, 1, 0.5)
    a, b = statistics(x), statistics(y)
    root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy()).real
    theirs = (a.mean - b.mean).square().sum() + (a.covariance + b.covariance).trace() - 2 * np.trace(root)
    assert frechet(a, b) == pytest.approx(theirs.item(), rel=1e-4)


def test_frechet_of_diagonal_covariances_by_hand():
    a = Statistics(torch.tensor([0.0, 1.0]).double(), torch.diag(torch.tensor([4.0, 9.0])).double(), 10)
    b = Statistics(torch.tensor([2.0, 1.0]).double(), torch.diag(torch.tensor([1.0, 16.0])).double(), 10)
    assert frechet(a, b) == pytest.approx(4 + (2 - 1) ** 2 + (3 - 4) ** 2, rel=1e-12)


@pytest.mark.parametrize("n", [30, 101])
def test_kernel_distance_is_torchmetrics(n: int):
    x, y = draw(n, 0), draw(n, 1, 0.4)
    theirs, _ = metric_of(KernelInceptionDistance, x, y, subsets=2, subset_size=n)  # each subset is everything
    ours = kernel_distance(x, y)
    assert ours.shape == (1,)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4)


def test_kernel_distance_by_hand():
    x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [3.0]])
    assert kernel_distance(x, y).item() == pytest.approx(27 + 1 - 2 * (1 + 64 + 1 + 343) / 4, rel=1e-12)


def test_subsets_are_keyed_and_agree_with_the_whole():
    x, y = draw(300, 0), draw(260, 1, 0.6)
    ours = kernel_distance(x, y, seed=3, subsets=80, size=100)
    assert ours.shape == (80,)
    assert ours.std() > 0
    assert torch.equal(ours, kernel_distance(x, y, seed=3, subsets=80, size=100))
    assert not torch.equal(ours, kernel_distance(x, y, seed=4, subsets=80, size=100))
    whole = kernel_distance(x[:260], y).item()
    assert ours.mean().item() == pytest.approx(whole, abs=4 * ours.std().item() / 80**0.5 + 0.1 * abs(whole))


def test_cmmd_is_the_double_loop(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distances, "BLOCK", 4)  # several blocks, the last one not full
    x, y = draw(11, 0), draw(9, 1, 0.5)
    u, v = ([z / z.norm() for z in side.double()] for side in (x, y))

    def mean(a: list[Tensor], b: list[Tensor]) -> float:
        return sum(float(torch.exp(-(p - q).square().sum() / (2 * 10**2))) for p in a for q in b) / len(a) / len(b)

    assert cmmd(x, y) == pytest.approx(1000 * (mean(u, u) + mean(v, v) - 2 * mean(u, v)), rel=1e-6)


def test_identical_sets_are_at_zero_and_others_further_the_more_they_differ():
    x, near, far = draw(150, 0), draw(150, 1), draw(150, 2, 5.0)
    for distance in (lambda a, b: frechet(statistics(a), statistics(b)), cmmd):
        assert distance(x, x) == pytest.approx(0, abs=1e-6)
        assert 0 < distance(x, near) < distance(x, far)
    assert kernel_distance(x, x).item() < kernel_distance(x, near).item() < kernel_distance(x, far).item()


def test_cosines_by_hand():
    x, y = torch.tensor([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0]]), torch.tensor([[0.0, 3.0], [2.0, 2.0], [-1.0, 0.0]])
    assert cosines(x, y).tolist() == pytest.approx([0, 1, -1])


@pytest.mark.parametrize(
    "distance", [lambda a, b: frechet(statistics(a), statistics(b)), kernel_distance, cmmd, cosines]
)
def test_unequal_widths_are_said(distance):
    with pytest.raises(UserError, match="12 and of 5 numbers"):
        distance(draw(6, 0), draw(6, 1)[:, :5])


@pytest.mark.parametrize("distance", [lambda a, b: frechet(statistics(a), statistics(b)), kernel_distance])
def test_one_image_is_too_few(distance):
    with pytest.raises(UserError, match="2 or more images"):
        distance(draw(6, 0), draw(1, 1))
