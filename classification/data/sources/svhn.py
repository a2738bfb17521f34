"""SVHN's cropped digits: the Hub, or train_32x32.mat and test_32x32.mat of http://ufldl.stanford.edu/housenumbers/.

The `extra` images are not used. An example's id is its file and its place there, counted from 0: "train_32x32/17".
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from classification.data.dataset import Dataset, Images
from classification.data.sources import checks, hub, matlab
from erase_sd.common.errors import UserError

SIDE = 32  # pixels
COPY = hub.Copy(id="ufldl-stanford/svhn", config="cropped_digits", image="image", label="label")


def load(folder: str | None) -> Dataset:
    """Return SVHN: 73 257 and 26 032 images of house numbers, the class is the digit in the middle."""
    if folder is None or hub.is_copy(folder):
        train, test, _ = hub.read(COPY, folder, classes=10, side=SIDE)
    else:
        root = checks.root(folder, "svhn", ["train_32x32.mat", "test_32x32.mat"])
        train, test = _read(root / "train_32x32.mat"), _read(root / "test_32x32.mat")
    return Dataset(
        name="svhn",
        train=train,
        test=test,
        classes=tuple("0123456789"),
        mean=(0.4377, 0.4438, 0.4728),
        std=(0.1201, 0.1231, 0.1052),
        augment="none",
    )


def _read(path: Path) -> Images:
    """Read one MATLAB file: X uint8 (32, 32, 3, N) and y (N, 1), in which 10 stands for the digit 0."""
    content = matlab.read(path, ("X", "y"))
    for name in ("X", "y"):
        if name not in content:
            raise UserError(f"{path} has no variable {name}: get the original file again")
    x, y = content["X"], content["y"]
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[:3] != (SIDE, SIDE, 3):
        raise UserError(
            f"{path}: X is {x.dtype} {x.shape}, not uint8 (32, 32, 3, images): get the original file again"
        )
    if (y != np.floor(y)).any():
        raise UserError(f"{path}: y does not hold whole numbers: get the original file again")
    wrong = np.flatnonzero((y < 1) | (y > 10))
    if len(wrong):
        raise UserError(
            f"{path}: image {wrong[0]} is labelled {y.flat[wrong[0]]:g}, but the original has 1 to 10, "
            "where 10 means the digit 0: get it again"
        )
    return Images(
        pixels=torch.from_numpy(np.ascontiguousarray(x.transpose(3, 2, 0, 1))),
        labels=checks.labels(y.reshape(-1).astype(np.int64) % 10, 10, x.shape[3], path),
        ids=tuple(f"{path.stem}/{row}" for row in range(x.shape[3])),
    )
