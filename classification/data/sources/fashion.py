"""Fashion-MNIST at half its size, 8 000 real 14x14 images that come with the package: everything runs offline on them.

The first 6 000 training and 2 000 test images of https://github.com/zalandoresearch/fashion-mnist (Xiao, Rasul and
Vollgraf, arXiv 1708.07747), MIT, see fashion.LICENSE; every 2x2 square has become its mean. Ids are those of
`classification.data.sources.idx`: "train/17". The file is made from the original ones by

    python -m classification.data.embed /usr/share/datasets/fashion-mnist
"""

from __future__ import annotations

import lzma
from hashlib import sha256
from pathlib import Path

import torch

from classification.data.dataset import Dataset, Images
from classification.data.sources import idx
from erase_sd.common.errors import UserError

FILE = Path(__file__).parents[1] / "fashion.xz"
SHA256 = "05224d1d5ede8862322e46be31fb29972f61f68ae3730d947b44374fdeea492a"
"""Of what the file unpacks to: pixels (8000, 14, 14), then labels (8000,), all uint8."""
SIDE = 14  # pixels
TRAIN, TEST = 6000, 2000


def load(folder: str | None) -> Dataset:
    """Return 6 000 and 2 000 images of 10 classes, one channel. They are not read from a folder.

    Raises UserError where the package's file is damaged.
    """
    try:
        content = lzma.decompress(FILE.read_bytes())
    except (OSError, lzma.LZMAError) as error:
        raise UserError(f"{FILE} cannot be read ({error}): install the package again") from error
    if sha256(content).hexdigest() != SHA256:
        raise UserError(f"{FILE} is damaged: install the package again")
    n = TRAIN + TEST
    pixels = torch.frombuffer(bytearray(content[: n * SIDE**2]), dtype=torch.uint8).view(n, 1, SIDE, SIDE)
    labels = torch.frombuffer(bytearray(content[n * SIDE**2 :]), dtype=torch.uint8).long()
    train, test = slice(0, TRAIN), slice(TRAIN, n)
    return Dataset(
        name="fashion",
        train=Images(pixels=pixels[train], labels=labels[train], ids=_ids("train", TRAIN)),
        test=Images(pixels=pixels[test], labels=labels[test], ids=_ids("t10k", TEST)),
        classes=idx.FASHION.classes,
        mean=(0.2860,),
        std=(0.3310,),
        augment="none",
    )


def _ids(part: str, n: int) -> tuple[str, ...]:
    return tuple(f"{part}/{row}" for row in range(n))
