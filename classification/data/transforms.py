"""Random changes of training images, on uint8 batches: what torchvision calls RandomCrop and RandomHorizontalFlip.

Every sample brings its own numbers, so that it changes alike whichever batch or process it is in.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

# kind: (pixels of black around the image, a window of the old size falls anywhere in it; whether half are mirrored)
AUGMENTS = {"crop-flip": (4, True), "flip": (0, True), "shift": (1, False), "none": (0, False)}


def augment(pixels: Tensor, kind: str, u: Tensor) -> Tensor:
    """Change each image (B, C, H, W) uint8 as its numbers u (B, 3), uniform in [0, 1), say: top, left, mirrored.

    Raises ValueError if there are not three numbers per image, KeyError for a kind that is not in AUGMENTS.
    """
    margin, mirrors = AUGMENTS[kind]
    if u.shape != (len(pixels), 3):
        raise ValueError(f"{len(pixels)} images need three numbers each, not {tuple(u.shape)}")
    if kind == "none" or not len(pixels):
        return pixels
    height, width = pixels.shape[2:]
    top, left = (u[:, :2] * (2 * margin + 1)).long().T  # (B,), uniform in 0..2 margin
    y = top[:, None] + torch.arange(height)  # (B, H)
    x = left[:, None] + torch.arange(width)  # (B, W)
    if mirrors:
        x = torch.where(u[:, 2:] < 0.5, x.flip(1), x)
    batch = torch.arange(len(pixels))[:, None, None, None]
    channel = torch.arange(pixels.shape[1])[:, None, None]
    return pad(pixels, (margin,) * 4)[batch, channel, y[:, None, :, None], x[:, None, None, :]]


def to_float(pixels: Tensor) -> Tensor:
    """Return uint8 pixels as float32 in [0, 1]; the networks normalise in their first layer."""
    return pixels.float() / 255
