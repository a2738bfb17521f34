"""What a data set is, whatever it came from: pixels, labels and the name of every example, all in memory."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
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
    labelled_by: str = ""  # the file that says what the images show, where there is a choice of them

    def fingerprint(self) -> str:
        """Return the SHA-256 of all pixels and labels in their order: data sets of one name may differ in it."""
        total = sha256(repr(self.classes).encode())
        for part in (self.train, self.test):
            total.update(repr(tuple(part.pixels.shape)).encode())
            for tensor in (part.labels, part.pixels):
                total.update(tensor.contiguous().numpy())
        return total.hexdigest()
