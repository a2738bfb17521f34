"""Make the embedded images from Fashion-MNIST's original files: `python -m classification.data.embed FOLDER`.

The folder has its four IDX files, as Debian's package dataset-fashion-mnist in /usr/share/datasets/fashion-mnist.
"""

from __future__ import annotations

import lzma
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch

from classification.data.sources import fashion, idx
from erase_sd.common.cli import argument, command, run_main
from erase_sd.common.errors import UserError
from erase_sd.common.files import write_atomic

PACKED = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4}]  # the smallest of those tried


def halved(pixels: np.ndarray) -> np.ndarray:
    """Return images (N, 2H, 2W) uint8 at half their size, (N, H, W): the mean of every 2x2 square, halves upwards."""
    n, height, width = pixels.shape
    squares = pixels.reshape(n, height // 2, 2, width // 2, 2).astype(np.uint16)
    return ((squares.sum((2, 4), dtype=np.uint16) + 2) // 4).astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class FashionFile:
    """Where the original files are."""

    folder: str = argument("folder of the four IDX files of Fashion-MNIST")


def write(options: FashionFile) -> None:
    """Write the embedded file. Raises UserError for originals that are missing, damaged or others than they were."""
    whole = idx.fashion(options.folder)
    parts = (whole.train.take(torch.arange(fashion.TRAIN)), whole.test.take(torch.arange(fashion.TEST)))
    pixels = torch.cat([part.pixels[:, 0] for part in parts]).numpy()
    labels = torch.cat([part.labels for part in parts]).to(torch.uint8).numpy()
    content = halved(pixels).tobytes() + labels.tobytes()
    found = sha256(content).hexdigest()
    if found != fashion.SHA256:
        raise UserError(f"{options.folder} gives {found} and not {fashion.SHA256}: these are other images")
    write_atomic(fashion.FILE, lzma.compress(content, format=lzma.FORMAT_XZ, filters=PACKED))
    print(f"{fashion.FILE}: {fashion.FILE.stat().st_size} bytes")


main = command("embed", "Make the embedded images from the original files.", FashionFile, write)

if __name__ == "__main__":
    run_main(main)
