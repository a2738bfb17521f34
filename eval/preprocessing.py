"""From a picture to what a network of the Hub was trained on, by the model's own numbers, with PIL and torch alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from erase_sd.process import UserError

FILES = ("preprocessor_config.json", "processor_config.json")  # the second is what a CLIPProcessor writes


def prepared(image: Image.Image, how: dict[str, Any]) -> Tensor:
    """(3, H, W) normalised: resized (by its shorter side, or to a fixed size), cut from the middle, standardised.

    The numbers are those of transformers' own image processors on PIL.
    """
    size, crop = how["size"], how["crop"]
    if isinstance(size, int):
        short = min(image.size)
        size = [int(size * side / short) for side in reversed(image.size)]
    image = image.resize((size[1], size[0]), Image.Resampling(how["resample"]))
    if crop:
        top, left = (image.height - crop[0]) // 2, (image.width - crop[1]) // 2
        image = image.crop((left, top, left + crop[1], top + crop[0]))
    x = torch.from_numpy(np.array(image)).movedim(-1, 0).float() / 255
    mean, std = (torch.tensor(how[part])[:, None, None] for part in ("mean", "std"))
    return (x - mean) / std


def of_model(source: str) -> dict[str, Any]:
    """size, crop (pixels), mean, std and resample from the model's own file.

    Raises UserError where that says nothing of them, and what transformers raises for a model that cannot be had.
    """
    from transformers.utils import cached_file

    cached_file(source, "config.json")  # raises where there is no such model; the files below may be missing
    found = [cached_file(source, name, _raise_exceptions_for_missing_entries=False) for name in FILES]
    files = [json.loads(Path(path).read_text(encoding="utf-8")) for path in found if path]
    stored = files[0].get("image_processor", files[0]) if files else {}
    if absent := {"size", "image_mean", "image_std"} - stored.keys():
        raise UserError(f"--features: {FILES[0]} of {source} says nothing of {min(absent)}: add that file")
    return {
        "size": _pixels(stored["size"]),
        "crop": _pair(stored["crop_size"]) if stored.get("do_center_crop", "crop_size" in stored) else None,
        "mean": stored["image_mean"],
        "std": stored["image_std"],
        "resample": stored.get("resample", Image.Resampling.BICUBIC.value),
    }


def _pixels(size: int | dict[str, int]) -> int | list[int]:
    """The length of the shorter side, or [height, width]."""
    if isinstance(size, dict) and "shortest_edge" not in size:
        return _pair(size)
    return size["shortest_edge"] if isinstance(size, dict) else size


def _pair(size: int | dict[str, int]) -> list[int]:
    return [size["height"], size["width"]] if isinstance(size, dict) else [size, size]
