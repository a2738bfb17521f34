"""MNIST and what is written like it: the Hub, or four IDX files, as they are or compressed by gzip.

    train-images-idx3-ubyte  train-labels-idx1-ubyte  t10k-images-idx3-ubyte  t10k-labels-idx1-ubyte

Fashion-MNIST: https://github.com/zalandoresearch/fashion-mnist, MIT, and Debian's package dataset-fashion-mnist.
KMNIST: http://codh.rois.ac.jp/kmnist/. The format: http://yann.lecun.com/exdb/mnist/. An example's id is its file and
its place there, counted from 0: "train/17".
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from classification.data.dataset import Dataset, Images
from classification.data.sources import checks, hub
from erase_sd.common.errors import UserError

SIDE = 28  # pixels
UNSIGNED_BYTES = 0x08  # the only type of numbers that these files hold
MOST = 1_000_000  # examples in a file: what is read of one that claims more
DAMAGE = (OSError, EOFError, zlib.error, struct.error, ValueError)


@dataclass(frozen=True, kw_only=True)
class IdxFormat:
    """What differs between the data sets of this form."""

    name: str
    folder: str  # where the files are in the given folder, if not there themselves
    classes: tuple[str, ...]
    mean: float
    std: float
    copy: hub.Copy | None = None


FASHION = IdxFormat(
    name="fashion-mnist",
    folder="FashionMNIST/raw",
    classes=(
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    mean=0.2860,
    std=0.3530,
    copy=hub.Copy(id="zalando-datasets/fashion_mnist", config="fashion_mnist", image="image", label="label", mode="L"),
)
MNIST = IdxFormat(
    name="mnist",
    folder="MNIST/raw",
    classes=tuple("0123456789"),
    mean=0.1307,
    std=0.3081,
    copy=hub.Copy(id="ylecun/mnist", config="mnist", image="image", label="label", mode="L"),
)
KMNIST = IdxFormat(
    name="kmnist",
    folder="KMNIST/raw",
    classes=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    mean=0.1918,
    std=0.3483,
)


def load(family: IdxFormat, folder: str | None) -> Dataset:
    """Return 60 000 and 10 000 images of 10 classes, 28x28 and one channel.

    Raises UserError for files that are missing, damaged or of other images, and for KMNIST without a folder.
    """
    if folder is None and family.copy is None:
        raise UserError(f"{family.name} is read from a folder only: give a data folder with its four IDX files")
    if family.copy is not None and (folder is None or hub.is_copy(folder)):
        train, test, _ = hub.read(family.copy, folder, classes=len(family.classes), side=SIDE)
    else:
        root = Path(folder, family.folder)
        if not root.is_dir():
            root = Path(folder)
        train, test = _part(root, "train", family), _part(root, "t10k", family)
    return Dataset(
        name=family.name,
        train=train,
        test=test,
        classes=family.classes,
        mean=(family.mean,),
        std=(family.std,),
        augment="none",
    )


fashion = partial(load, FASHION)
mnist = partial(load, MNIST)
kmnist = partial(load, KMNIST)


def _part(root: Path, name: str, family: IdxFormat) -> Images:
    """Read the images and the labels of one part, "train" or "t10k"."""
    image_file = _file(root, f"{name}-images-idx3-ubyte")
    label_file = _file(root, f"{name}-labels-idx1-ubyte")
    pixels = read(image_file, dimensions=3)
    if pixels.shape[1:] != (SIDE, SIDE):
        high, wide = pixels.shape[1:]
        raise UserError(f"{image_file} has images of {high}x{wide} pixels, not {SIDE}x{SIDE}: it is another data set")
    labels = read(label_file, dimensions=1)
    return Images(
        pixels=torch.from_numpy(pixels)[:, None],
        labels=checks.labels(labels, len(family.classes), len(pixels), label_file),
        ids=tuple(f"{name}/{row}" for row in range(len(pixels))),
    )


def _file(root: Path, name: str) -> Path:
    """Return the file of this name, as it is or compressed. UserError if there is neither."""
    for path in (root / name, root / f"{name}.gz"):
        if path.is_file():
            return path
    raise UserError(f"{root} has no {name} and no {name}.gz: put the four original files there")


def read(path: Path, dimensions: int) -> np.ndarray:
    """Return the unsigned bytes of an IDX file, an array of so many dimensions.

    The head is two zeros, the type of the numbers, how many dimensions there are, and the size of each, big-endian.
    Raises UserError for a file that is damaged, cut, too long, or of other numbers or dimensions.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            zeros, kind, found = struct.unpack(">HBB", file.read(4))
            if (zeros, kind, found) != (0, UNSIGNED_BYTES, dimensions):
                raise ValueError(f"its head is not that of bytes in {dimensions} dimensions")
            shape = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
            size = math.prod(shape)
            if size > MOST * SIDE**2:
                raise ValueError(f"it claims to hold {size} bytes")
            content = file.read(size + 1)
            if len(content) < size:
                raise ValueError(f"it should hold {size} bytes after its head, and has {len(content)}")
            if len(content) > size:
                raise ValueError(f"it has more than the {size} bytes that its head tells of")
    except DAMAGE as error:
        raise UserError(f"{path} is damaged or no IDX file ({error}): get the original file again") from error
    return np.frombuffer(bytearray(content), np.uint8).reshape(shape)
