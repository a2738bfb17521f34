"""Walking through a set epoch by epoch, shuffled anew: sample i is a function of (seed, purpose, i), whoever asks."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from classification.data import Dataset, Images
from classification.transforms import augment, to_float
from erase_sd.runtime import generator

DRAWS = 4  # uniform numbers per sample of an epoch: one for its other label, three for its augmentation


class Samples(NamedTuple):
    """This rank's slice of one set: pixels (n, C, H, W) in [0, 1], labels (n,), other labels (n,) for redirect."""

    x: Tensor
    y: Tensor
    other: Tensor


class Batch:
    """Forget and retain samples of one step, drawn when they are first asked for: many methods need only one set."""

    def __init__(self, draw: Callable[[str], Samples]) -> None:
        self._draw = draw

    @cached_property
    def forget(self) -> Samples:
        """Samples of the forget set."""
        return self._draw("forget")

    @cached_property
    def retain(self) -> Samples:
        """Samples of the retain set."""
        return self._draw("retain")


class Walk:
    """One set and its order for every purpose."""

    def __init__(self, images: Images, dataset: Dataset, name: str, seed: int) -> None:
        self.images, self.dataset = images, dataset
        self.augment, self.classes = dataset.augment, len(dataset.classes)
        self.name, self.seed = name, seed
        self._epochs: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}

    def samples(self, purpose: str, positions: Tensor) -> Samples:
        """The augmented samples at these positions (n,) of the walk."""
        n = len(self.images)
        rows, u = torch.empty_like(positions), torch.empty(len(positions), DRAWS)
        for epoch in (positions // n).unique().tolist():
            order, draws = self._epoch(purpose, epoch)
            here = positions // n == epoch
            rows[here], u[here] = order[positions[here] % n], draws[positions[here] % n]
        pixels = augment(self.images.pixels[rows], self.augment, u[:, 1:])
        return self._with_others(to_float(pixels), self.images.labels[rows], 1 + (u[:, 0] * (self.classes - 1)).long())

    def part(self, share: float) -> Walk:
        """A walk through a share of the set, in (0, 1], drawn once: at least one example, and itself for 1."""
        if share == 1:
            return self
        n = len(self.images)
        rows = torch.randperm(n, generator=generator(self.seed, "part", self.name))[: max(1, round(share * n))]
        return Walk(self.images.take(rows), self.dataset, self.name, self.seed)

    def clean(self, rows: Tensor) -> Samples:
        """Examples by row (n,), as they are; the other label is the next one."""
        images = self.images.take(rows)
        return self._with_others(to_float(images.pixels), images.labels, torch.ones(len(rows)).long())

    def _with_others(self, x: Tensor, y: Tensor, shift: Tensor) -> Samples:
        """Beside each label the one `shift` classes further, which is never the true one."""
        return Samples(x, y, (y + shift) % self.classes)

    def _epoch(self, purpose: str, epoch: int) -> tuple[Tensor, Tensor]:
        """Order (n,) and uniform draws (n, DRAWS) of one epoch; those of the last two are kept."""
        key = (purpose, epoch)
        if key not in self._epochs:
            self._epochs = {k: v for k, v in self._epochs.items() if k[0] != purpose or k[1] == epoch - 1}
            g, n = generator(self.seed, "walk", self.name, purpose, epoch), len(self.images)
            self._epochs[key] = torch.randperm(n, generator=g), torch.rand(n, DRAWS, generator=g)
        return self._epochs[key]
