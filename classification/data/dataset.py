"""What a data set is, whatever it came from: pixels, labels and the name of every example, all in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Images:
    """Labelled images. `ids` name each example as its source does, so that a run can say which ones it forgot."""

    pixels: Tensor  # (N, C, H, W) uint8, on the CPU
    labels: Tensor  # (N,) int64
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor) -> Images:
        """Return the examples of these rows (n,) int64, in their order."""
        ids = [self.ids[row] for row in rows.tolist()]
        return Images(pixels=self.pixels[rows], labels=self.labels[rows], ids=tuple(ids))


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """A data set's two parts and what training on it is usually done with."""

    name: str
    train: Images
    test: Images
    classes: tuple[str, ...]
    mean: tuple[float, ...]  # per channel, of pixels scaled to [0, 1]
    std: tuple[float, ...]
    augment: Literal["crop-flip", "flip", "shift", "none"]  # random changes of a training image
